/*
 * Shows a clock to the host: writes the time into one page of memory, over and over.
 *
 *   hvhost-clock realtime|DEVICE SECONDS
 *
 * DEVICE is a PTP clock (/dev/ptp0). Prints the page's physical address and the process id, and
 * goes on in the background. The page holds one 64-bit number, the time in nanoseconds since 1970.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* As the kernel makes a clock id of a file descriptor (linux/posix-timers.h). */
#define FD_TO_CLOCKID(fd) ((clockid_t)((((unsigned int)~(fd)) << 3) | 3))

static uint64_t physical_address(void *page)
{
	uint64_t entry = 0;
	long size = sysconf(_SC_PAGESIZE);
	int fd = open("/proc/self/pagemap", O_RDONLY);
	off_t place = (uintptr_t)page / size * sizeof entry;

	if (fd < 0 || pread(fd, &entry, sizeof entry, place) != sizeof entry)
		return 0;
	close(fd);
	/* Bit 63: the page is in memory; the low 55 bits are its number. */
	return entry >> 63 ? (entry & ((1ULL << 55) - 1)) * size : 0;
}

int main(int argc, char **argv)
{
	clockid_t clock = CLOCK_REALTIME;
	struct timespec now;
	volatile uint64_t *page;
	uint64_t address;
	pid_t child;

	if (argc != 3) {
		fprintf(stderr, "usage: hvhost-clock realtime|DEVICE SECONDS\n");
		return 2;
	}
	if (strcmp(argv[1], "realtime")) {
		int fd = open(argv[1], O_RDONLY);

		if (fd < 0) {
			perror(argv[1]);
			return 1;
		}
		clock = FD_TO_CLOCKID(fd);
	}
	if (clock_gettime(clock, &now)) {
		perror(argv[1]);
		return 1;
	}
	page = mmap(NULL, sysconf(_SC_PAGESIZE), PROT_READ | PROT_WRITE,
		    MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (page == MAP_FAILED || mlock((void *)page, 8)) {
		perror("hvhost-clock: memory");
		return 1;
	}
	*page = 1;
	address = physical_address((void *)page);
	if (!address) {
		fprintf(stderr, "hvhost-clock: the kernel does not tell physical addresses\n");
		return 1;
	}
	child = fork();
	if (child < 0) {
		perror("hvhost-clock: fork");
		return 1;
	}
	if (child) {
		printf("%llu %d\n", (unsigned long long)address, (int)child);
		return 0;
	}
	setsid();
	freopen("/dev/null", "r+", stdin);
	dup2(0, 1);
	dup2(0, 2);
	alarm(atoi(argv[2]));
	for (;;) {
		if (clock_gettime(clock, &now))
			return 1;
		*page = now.tv_sec * 1000000000ULL + now.tv_nsec;
	}
}
