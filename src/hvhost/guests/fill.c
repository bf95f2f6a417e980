/*
 * hvhost-fill MIB [MIB-A-SECOND]: fills so much memory, no quicker than it is told, says "filled",
 * and keeps it. On SIGUSR1 it checks all of it and says how many pages there are, how many hold
 * something else than it wrote, how many lie above 4 GiB of physical memory, and the highest
 * physical address, which only root is told.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, MIB = 1 << 20, ENTRIES = 512 };

#define PFN_MASK ((1ULL << 55) - 1)
#define PRESENT (1ULL << 63)
#define FOUR_GIB_PFN (1ULL << 20)

static uint64_t mark(size_t page)
{
	return (uint64_t)getpid() << 32 | page;
}

/* A page that stands for another one, as a cut address makes it, has the other's mark. */
static size_t wrong_pages(const char *memory, size_t pages)
{
	size_t wrong = 0;

	for (size_t page = 0; page < pages; page++) {
		uint64_t first, last;

		memcpy(&first, memory + page * PAGE, sizeof first);
		memcpy(&last, memory + (page + 1) * PAGE - sizeof last, sizeof last);
		wrong += first != mark(page) || last != ~mark(page);
	}
	return wrong;
}

static int report(const char *memory, size_t pages)
{
	uint64_t entries[ENTRIES], highest = 0;
	size_t above = 0;
	int file = open("/proc/self/pagemap", O_RDONLY);

	if (file < 0)
		return 1;
	for (size_t page = 0; page < pages; page += ENTRIES) {
		size_t count = pages - page < ENTRIES ? pages - page : ENTRIES;
		off_t place = ((uintptr_t)memory / PAGE + page) * sizeof *entries;

		if (pread(file, entries, count * sizeof *entries, place) !=
		    (ssize_t)(count * sizeof *entries))
			return 1;
		for (size_t i = 0; i < count; i++) {
			uint64_t pfn = entries[i] & PRESENT ? entries[i] & PFN_MASK : 0;

			above += pfn >= FOUR_GIB_PFN;
			highest = pfn > highest ? pfn : highest;
		}
	}
	close(file);
	printf("pages %zu wrong %zu above-4g %zu highest %#llx\n", pages,
	       wrong_pages(memory, pages), above, (unsigned long long)highest * PAGE);
	fflush(stdout);
	return 0;
}

int main(int argc, char **argv)
{
	size_t size, pages, rate = 0;
	char *memory;
	sigset_t set;
	int number;

	if (argc < 2 || argc > 3 || !(size = strtoul(argv[1], NULL, 0) * MIB) ||
	    (argc == 3 && !(rate = strtoul(argv[2], NULL, 0)))) {
		fprintf(stderr, "usage: hvhost-fill MIB [MIB-A-SECOND]\n");
		return 2;
	}
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigprocmask(SIG_BLOCK, &set, NULL);
	memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED) {
		perror("mmap");
		return 1;
	}
	pages = size / PAGE;
	for (size_t page = 0; page < pages; page++) {
		uint64_t first = mark(page), last = ~first;

		if (rate && page % (MIB / PAGE) == 0)
			usleep(1000000 / rate);
		memcpy(memory + page * PAGE, &first, sizeof first);
		memcpy(memory + (page + 1) * PAGE - sizeof last, &last, sizeof last);
	}
	printf("filled %zu\n", size);
	fflush(stdout);
	while (!sigwait(&set, &number))
		if (report(memory, pages))
			return 1;
	return 1;
}
