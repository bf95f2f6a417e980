/* Sends back what comes: one connection after the other at TCP port 5003. For round trips. */
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

int main(void)
{
	int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
	struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(5003)};
	char data[4096];

	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(listener, (struct sockaddr *)&here, sizeof(here)) || listen(listener, 4))
		return 1;
	for (;;) {
		int stream = accept(listener, 0, 0);
		ssize_t size;

		setsockopt(stream, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		while ((size = read(stream, data, sizeof(data))) > 0)
			if (write(stream, data, size) != size)
				break;
		close(stream);
	}
}
