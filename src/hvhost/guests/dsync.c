/*
 * hvhost-dsync FILE OFFSET: writes standard input, up to 1 MiB in whole sectors, to FILE with
 * O_DIRECT and O_DSYNC: on a disk, write commands that force unit access.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { LIMIT = 1 << 20, SECTOR = 512 };

int main(int argc, char **argv)
{
	char *buffer;
	size_t size = 0;
	ssize_t count;
	int file;

	if (argc != 3) {
		fprintf(stderr, "usage: hvhost-dsync FILE OFFSET\n");
		return 2;
	}
	if (posix_memalign((void **)&buffer, 4096, LIMIT))
		return 1;
	while (size < LIMIT && (count = read(0, buffer + size, LIMIT - size)) > 0)
		size += count;
	file = open(argv[1], O_WRONLY | O_DIRECT | O_DSYNC);
	if (file < 0) {
		perror(argv[1]);
		return 1;
	}
	size -= size % SECTOR;
	if (pwrite(file, buffer, size, strtoull(argv[2], NULL, 0)) != (ssize_t)size) {
		perror("write");
		return 1;
	}
	return 0;
}
