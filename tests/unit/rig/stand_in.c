/* Stands in for the rig's QEMU: speaks the ivshmem client's side of the protocol on a Unix socket
 * and runs the agent itself on top, as a process of this computer. MSI-X vectors are the keeper's
 * eventfds as they come; the doorbell raises the eventfds of the peer it names.
 *
 * stand_in SOCKET [no-agent|slow]: with "no-agent" it connects and then does nothing; with "slow" it
 * takes its time to learn of peers, as a busy QEMU does while the agent works already. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/kvm.h>
#include <linux/vfio.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

static ssize_t ring(int fd, const void *data, size_t size, off_t offset);

#define main agent_main
#define reboot(how) _exit(70)
#define pwrite ring
#include "agent.c"
#undef main

#define MAXIMUM_PEERS 4096

static int peers[MAXIMUM_PEERS][VECTORS];
static unsigned peer_vectors[MAXIMUM_PEERS];
static pthread_mutex_t peers_lock = PTHREAD_MUTEX_INITIALIZER;
static int connection, slow;

static void fail(const char *what)
{
	fprintf(stderr, "stand-in: %s: %s\n", what, strerror(errno));
	exit(71);
}

static ssize_t ring(int fd, const void *data, size_t size, off_t offset)
{
	uint32_t value;
	uint64_t one = 1;
	if (fd != device || size != 4 || offset != DOORBELL)
		fail("not the doorbell");
	memcpy(&value, data, 4);
	unsigned peer = value >> 16, vector = value & 0xffff;
	pthread_mutex_lock(&peers_lock);
	if (peer < MAXIMUM_PEERS && vector < peer_vectors[peer] &&
	    write(peers[peer][vector], &one, 8) != 8)
		fail("raising a doorbell");
	pthread_mutex_unlock(&peers_lock);
	return size;
}

/* One message: a number and perhaps a descriptor (or -1). 0 at the end of the connection. */
static int receive(int64_t *number, int *descriptor)
{
	union {
		char space[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec part = { .iov_base = number, .iov_len = 8 };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
				  .msg_controllen = sizeof control };
	ssize_t size = recvmsg(connection, &message, MSG_CMSG_CLOEXEC | MSG_WAITALL);
	if (size <= 0)
		return 0;
	if (size != 8)
		fail("half a message");
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	*descriptor = -1;
	if (header && header->cmsg_type == SCM_RIGHTS)
		memcpy(descriptor, CMSG_DATA(header), sizeof(int));
	return 1;
}

static void peer_message(int64_t number, int descriptor)
{
	if (number < 1 || number >= MAXIMUM_PEERS)
		fail("a peer's number");
	pthread_mutex_lock(&peers_lock);
	if (descriptor >= 0) {
		if (peer_vectors[number] >= VECTORS)
			fail("too many vectors of a peer");
		peers[number][peer_vectors[number]++] = descriptor;
	} else {
		if (!peer_vectors[number])
			fail("a peer left that never came");
		while (peer_vectors[number])
			close(peers[number][--peer_vectors[number]]);
	}
	pthread_mutex_unlock(&peers_lock);
}

static void *listen_to_keeper(void *unused)
{
	int64_t number;
	int descriptor;
	(void)unused;
	while (receive(&number, &descriptor)) {
		if (slow)
			usleep(5000);
		peer_message(number, descriptor);
	}
	return NULL; /* as QEMU: it goes on without its server */
}

int main(int count, char **arguments)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	struct sigaction action = { .sa_handler = on_signal };
	pthread_t listener;
	int64_t number;
	int descriptor, own = 0;
	if (count < 2 || strlen(arguments[1]) >= sizeof address.sun_path)
		return 64;
	strcpy(address.sun_path, arguments[1]);
	connection = socket(AF_UNIX, SOCK_STREAM, 0);
	if (connect(connection, (struct sockaddr *)&address, sizeof address) < 0)
		fail("connecting");
	if (!receive(&number, &descriptor) || number != 0 || descriptor >= 0)
		fail("protocol version");
	if (!receive(&number, &descriptor) || number != 0 || descriptor >= 0)
		fail("own number");
	if (!receive(&number, &descriptor) || number != -1 || descriptor < 0)
		fail("shared memory");
	struct stat memory;
	if (fstat(descriptor, &memory) < 0)
		fail("size of the shared memory");
	bar = mmap(NULL, memory.st_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, descriptor, 0);
	if (bar == MAP_FAILED)
		fail("mapping the shared memory");
	while (own < VECTORS) {
		if (!receive(&number, &descriptor))
			fail("the keeper left early");
		if (number)
			peer_message(number, descriptor);
		else
			vector_event[own++] = descriptor;
	}
	printf("stand-in: connected\n");
	fflush(stdout);
	slow = count > 2 && !strcmp(arguments[2], "slow");
	if (count > 2 && !strcmp(arguments[2], "no-agent"))
		for (;;)
			pause();
	sigaction(SIGUSR1, &action, NULL);
	if (pthread_create(&listener, NULL, listen_to_keeper, NULL))
		fail("a thread");
	serve();
}
