/*
 * Sends one Ethernet frame as it is, right or wrong: what a raw socket is given, the kernel leaves
 * alone.
 *
 *   hvhost-frame INTERFACE HEX
 */
#include <arpa/inet.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

static int digit(char c)
{
	const char *digits = "0123456789abcdef", *at = c ? strchr(digits, c) : NULL;

	return at ? (int)(at - digits) : -1;
}

int main(int argc, char **argv)
{
	struct sockaddr_ll to = { .sll_family = AF_PACKET, .sll_halen = 6 };
	unsigned char frame[9216];
	size_t size = 0;
	int fd;

	if (argc != 3) {
		fprintf(stderr, "usage: hvhost-frame INTERFACE HEX\n");
		return 2;
	}
	for (const char *hex = argv[2]; size < sizeof frame; hex += 2) {
		int high = digit(hex[0]), low = high < 0 ? -1 : digit(hex[1]);

		if (low < 0)
			break;
		frame[size++] = high << 4 | low;
	}
	to.sll_ifindex = if_nametoindex(argv[1]);
	memcpy(to.sll_addr, frame, 6);
	fd = socket(AF_PACKET, SOCK_RAW, htons(0x0003));
	if (fd < 0 || !to.sll_ifindex ||
	    sendto(fd, frame, size, 0, (struct sockaddr *)&to, sizeof to) != (ssize_t)size) {
		perror(argv[1]);
		return 1;
	}
	return 0;
}
