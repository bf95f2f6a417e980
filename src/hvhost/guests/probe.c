/*
 * The probe: a small static program that runs inside a guest and does what the host asks.
 *
 *   hvhost-probe TTY       serve requests on a serial port, or on a pair of descriptors ("-")
 *   hvhost-probe sockets   serve requests on Hyper-V sockets, each connection by itself
 *   hvhost-probe listen PORT    send back what comes over Hyper-V sockets, for tests
 *   hvhost-probe connect PORT   connect standard input and output to the host, for tests
 *   hvhost-probe wait FILE      return once the file is there
 *   hvhost-probe hotplug   load drivers for devices that are there or come later, and start the
 *                          distribution's Hyper-V daemons when their device nodes appear
 *
 * The framing and the messages are described in probe_protocol.py; nothing here depends on what
 * carries the bytes. A request that arrives while a command runs ends that command, except a
 * ping, which is answered at once: so the host can tell a busy guest from a dead one.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>
#include <linux/netlink.h>
#include <linux/vm_sockets.h>

enum {
	FRAME_MAX = 4096,   /* payload bytes of one frame, either direction */
	CHUNK = 3072,       /* output bytes sent in one frame */
	HEADER = 5,         /* type, request id */
	SOCKET_PORT = 26742,  /* "hv"; PROBE_PORT in probe.py */
};

#define SOCKETS_FILE "/run/hvhost-sockets"  /* SOCKETS_FILE in probe.py */

enum { PING = 'P', EXEC = 'X', READ = 'R', WRITE = 'W' };
enum { HELLO = 'H', PONG = 'p', OUTPUT = 'o', ERRORS = 'e', DONE = 'd' };
enum { EXITED = 0, SIGNALLED = 1, TIMED_OUT = 2, FAILED = 3, CANCELLED = 4 };
enum { TRUNCATED = 1 };
enum { CREATE = 1 };

static int in_fd, out_fd;
static uint8_t pending[FRAME_MAX + 1];  /* a request that ended the running command */
static size_t pending_size;
static uint8_t input[4096];
static size_t input_size, input_next;
static pid_t running;  /* the command, while there is one */

static uint32_t get32(const uint8_t *p)
{
	return p[0] | p[1] << 8 | p[2] << 16 | (uint32_t)p[3] << 24;
}

static void put32(uint8_t *p, uint32_t value)
{
	p[0] = value, p[1] = value >> 8, p[2] = value >> 16, p[3] = value >> 24;
}

static uint32_t crc32(const uint8_t *data, size_t size)
{
	static uint32_t table[256];
	uint32_t crc = ~0u;

	if (!table[1])
		for (uint32_t i = 0; i < 256; i++) {
			uint32_t value = i;
			for (int bit = 0; bit < 8; bit++)
				value = value >> 1 ^ (value & 1 ? 0xEDB88320u : 0);
			table[i] = value;
		}
	while (size--)
		crc = table[(crc ^ *data++) & 0xFF] ^ crc >> 8;
	return ~crc;
}

static int64_t now_ms(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000ll + t.tv_nsec / 1000000;
}

static void write_all(const uint8_t *data, size_t size)
{
	while (size) {
		ssize_t n = write(out_fd, data, size);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			exit(1);
		data += n, size -= n;
	}
}

/* Frames: COBS over payload and CRC-32, between zero bytes. */
static void send_frame(const uint8_t *payload, size_t size)
{
	uint8_t plain[FRAME_MAX + 4], coded[FRAME_MAX + 4 + FRAME_MAX / 254 + 8];
	size_t used = 0, mark;

	memcpy(plain, payload, size);
	put32(plain + size, crc32(payload, size));
	size += 4;
	coded[used++] = 0;  /* ends whatever garbage came before */
	mark = used++;
	for (size_t i = 0; i < size; i++) {
		if (plain[i])
			coded[used++] = plain[i];
		if (!plain[i] || used - mark == 255) {
			coded[mark] = used - mark;
			mark = used++;
		}
	}
	coded[mark] = used - mark;
	coded[used++] = 0;
	write_all(coded, used);
}

static void send_message(int type, uint32_t id, const void *data, size_t size)
{
	uint8_t frame[FRAME_MAX];

	frame[0] = type;
	put32(frame + 1, id);
	memcpy(frame + HEADER, data, size);
	send_frame(frame, HEADER + size);
}

static void send_done(uint32_t id, int how, uint32_t value, int flags)
{
	uint8_t body[6] = { how, flags };
	put32(body + 2, value);
	send_message(DONE, id, body, sizeof body);
}

/* One byte in; the size of a complete valid payload in `frame`, or 0. */
static size_t decode_byte(uint8_t byte, uint8_t *frame)
{
	static uint8_t coded[FRAME_MAX + 64];
	static size_t used, lost;
	size_t size = 0, i = 0;

	if (byte) {
		if (used < sizeof coded)
			coded[used++] = byte;
		else
			lost = 1;
		return 0;
	}
	while (i < used && !lost) {
		size_t run = coded[i++];
		if (i + run - 1 > used || size + run > FRAME_MAX + 4)
			goto bad;
		memcpy(frame + size, coded + i, run - 1);
		size += run - 1, i += run - 1;
		if (run < 255 && i < used)
			frame[size++] = 0;
	}
	if (lost || size < HEADER + 4 || get32(frame + size - 4) != crc32(frame, size - 4))
		goto bad;
	used = lost = 0;
	return size - 4;
bad:
	used = lost = 0;
	return 0;
}

/* Read what is there; true if a request is now pending. Pings are answered here. */
static int receive(void)
{
	static uint8_t frame[FRAME_MAX + 4];

	if (input_next == input_size) {
		ssize_t n = read(in_fd, input, sizeof input);
		if (n < 0 && (errno == EINTR || errno == EAGAIN))
			return 0;
		if (n <= 0) {
			if (running > 0)  /* nobody waits for it any more */
				kill(-running, SIGKILL);
			exit(0);  /* hung up; init starts us again */
		}
		input_size = n, input_next = 0;
	}
	while (input_next < input_size) {
		size_t size = decode_byte(input[input_next++], frame);
		if (!size)
			continue;
		if (frame[0] == PING) {
			send_message(PONG, get32(frame + 1), frame + HEADER, size - HEADER);
			continue;
		}
		memcpy(pending, frame, size);
		pending[size] = 0;
		pending_size = size;
		return 1;
	}
	return 0;
}

struct stream {
	int fd, type;
	size_t used;
	uint32_t room;  /* bytes still wanted by the host */
	uint8_t data[CHUNK];
};

static void flush_stream(struct stream *s, uint32_t id)
{
	if (s->used)
		send_message(s->type, id, s->data, s->used);
	s->used = 0;
}

/* Move what is readable into frames; how much, 0 when the stream is dry or ended. */
static int drain(struct stream *s, uint32_t id, int *flags)
{
	uint8_t spill[4096];
	size_t want = sizeof s->data - s->used;
	ssize_t n;

	if (want > s->room)
		want = s->room;
	n = want ? read(s->fd, s->data + s->used, want) : read(s->fd, spill, sizeof spill);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return 0;
	if (n <= 0) {
		close(s->fd);
		s->fd = -1;
		return 0;
	}
	if (want) {
		s->used += n, s->room -= n;
		if (s->used == sizeof s->data)
			flush_stream(s, id);
	} else {
		*flags |= TRUNCATED;
	}
	return n;
}

/* What is in the pipe when a command ends belongs to it, however long the line takes for that; a
   process it left behind may keep the pipe open, and full, for ever. */
static void drain_rest(struct stream *s, uint32_t id, int *flags)
{
	int left = 0, moved;

	if (s->fd < 0)
		return;
	ioctl(s->fd, FIONREAD, &left);
	while (left > 0 && (moved = drain(s, id, flags)) > 0)
		left -= moved;
	if (s->fd >= 0)
		close(s->fd);
}

static void run_child(char **argv, int out, int err)
{
	int null = open("/dev/null", O_RDWR);
	sigset_t none;

	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGPIPE, SIG_DFL);
	setsid();
	dup2(null, 0), dup2(out, 1), dup2(err, 2);
	for (int fd = 3; fd < 64; fd++)
		close(fd);
	execvp(argv[0], argv);
	dprintf(2, "%s: %s\n", argv[0], strerror(errno));
	_exit(errno == ENOENT ? 127 : 126);
}

/* EXEC: timeout in ms (u32, 0: none), output limit per stream (u32), argv, each ended by NUL. */
static void do_exec(uint32_t id, uint8_t *body, size_t size)
{
	static struct stream out, err;
	char *argv[256];
	int pipes[2][2], count = 0, flags = 0, status = 0, how = -1;
	int64_t deadline;
	pid_t child;

	if (size < 9 || body[size - 1]) {
		send_done(id, FAILED, EINVAL, 0);
		return;
	}
	for (uint8_t *p = body + 8; p < body + size && count < 255; p += strlen((char *)p) + 1)
		argv[count++] = (char *)p;
	argv[count] = NULL;
	deadline = get32(body) ? now_ms() + get32(body) : INT64_MAX;
	if (pipe2(pipes[0], O_CLOEXEC)) {
		send_done(id, FAILED, errno, 0);
		return;
	}
	if (pipe2(pipes[1], O_CLOEXEC)) {
		send_done(id, FAILED, errno, 0);
		close(pipes[0][0]), close(pipes[0][1]);
		return;
	}
	child = fork();
	if (child == 0)
		run_child(argv, pipes[0][1], pipes[1][1]);
	close(pipes[0][1]), close(pipes[1][1]);
	out = (struct stream){ .fd = pipes[0][0], .type = OUTPUT, .room = get32(body + 4) };
	err = (struct stream){ .fd = pipes[1][0], .type = ERRORS, .room = get32(body + 4) };
	if (child < 0) {
		send_done(id, FAILED, errno, 0);
		close(out.fd), close(err.fd);
		return;
	}
	fcntl(out.fd, F_SETFL, O_NONBLOCK), fcntl(err.fd, F_SETFL, O_NONBLOCK);
	running = child;

	while (waitpid(child, &status, WNOHANG) == 0) {
		struct pollfd fds[3] = {
			{ .fd = out.fd, .events = POLLIN },
			{ .fd = err.fd, .events = POLLIN },
			{ .fd = in_fd, .events = POLLIN },
		};
		int waiting = input_next < input_size;  /* read together with this request */
		int64_t left = waiting ? 0 : deadline - now_ms();
		/* With both streams closed only the end itself is left, which nothing announces. */
		int64_t nap = out.fd < 0 && err.fd < 0 ? 2 : 50;

		poll(fds, 3, left < nap ? (left < 0 ? 0 : left) : nap);
		if ((waiting || fds[2].revents) && receive())
			how = CANCELLED;
		else if (now_ms() >= deadline)
			how = TIMED_OUT;
		if (how >= 0) {
			kill(-child, SIGKILL);
			kill(child, SIGKILL);
			waitpid(child, &status, 0);
			break;
		}
		if (fds[0].revents)
			drain(&out, id, &flags);
		if (fds[1].revents)
			drain(&err, id, &flags);
	}
	running = 0;
	drain_rest(&out, id, &flags);
	drain_rest(&err, id, &flags);
	flush_stream(&out, id), flush_stream(&err, id);
	if (how >= 0)
		send_done(id, how, 0, flags);
	else if (WIFSIGNALED(status))
		send_done(id, SIGNALLED, WTERMSIG(status), flags);
	else
		send_done(id, EXITED, WEXITSTATUS(status), flags);
}

/* READ: offset (u32), most bytes (u32), path ended by NUL. */
static void do_read(uint32_t id, uint8_t *body, size_t size)
{
	static struct stream s;
	int fd, flags = 0, error = 0;
	uint8_t more;

	if (size < 9 || body[size - 1]) {
		send_done(id, FAILED, EINVAL, 0);
		return;
	}
	fd = open((char *)body + 8, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0 || (get32(body) && lseek(fd, get32(body), SEEK_SET) < 0)) {
		send_done(id, FAILED, errno, 0);
		if (fd >= 0)
			close(fd);
		return;
	}
	s = (struct stream){ .fd = fd, .type = OUTPUT, .room = get32(body + 4) };
	while (s.room) {
		size_t want = sizeof s.data - s.used;
		ssize_t n = read(fd, s.data + s.used, want < s.room ? want : s.room);
		if (n < 0)
			error = errno;
		if (n <= 0)
			break;
		s.used += n, s.room -= n;
		if (s.used == sizeof s.data)
			flush_stream(&s, id);
	}
	if (!s.room && read(fd, &more, 1) > 0)
		flags |= TRUNCATED;
	flush_stream(&s, id);
	close(fd);
	send_done(id, error ? FAILED : EXITED, error, flags);
}

/* WRITE: offset (u32), flags (u16), mode (u16), path ended by NUL, data. */
static void do_write(uint32_t id, uint8_t *body, size_t size)
{
	uint8_t *end = size > 8 ? memchr(body + 8, 0, size - 8) : NULL;
	int fd, how;
	uint8_t *data;
	size_t left;

	if (!end) {
		send_done(id, FAILED, EINVAL, 0);
		return;
	}
	how = body[4] & CREATE ? O_CREAT | O_TRUNC : 0;
	fd = open((char *)body + 8, O_WRONLY | O_CLOEXEC | how, body[6] | body[7] << 8);
	if (fd < 0 || (get32(body) && lseek(fd, get32(body), SEEK_SET) < 0)) {
		send_done(id, FAILED, errno, 0);
		if (fd >= 0)
			close(fd);
		return;
	}
	/* An empty write matters: it creates the file. */
	for (data = end + 1, left = body + size - data; left;) {
		ssize_t n = write(fd, data, left);
		if (n < 0) {
			send_done(id, FAILED, errno, 0);
			close(fd);
			return;
		}
		data += n, left -= n;
	}
	if (close(fd))
		send_done(id, FAILED, errno, 0);
	else
		send_done(id, EXITED, 0, 0);
}

static void serve(void)
{
	static uint8_t request[FRAME_MAX + 1];

	send_message(HELLO, getpid(), "", 0);
	for (;;) {
		while (!pending_size)
			receive();
		size_t size = pending_size;
		memcpy(request, pending, size + 1);
		pending_size = 0;
		uint32_t id = get32(request + 1);
		switch (request[0]) {
		case EXEC:
			do_exec(id, request + HEADER, size - HEADER);
			break;
		case READ:
			do_read(id, request + HEADER, size - HEADER);
			break;
		case WRITE:
			do_write(id, request + HEADER, size - HEADER);
			break;
		default:
			send_done(id, FAILED, ENOSYS, 0);
		}
	}
}

static void open_port(const char *name)
{
	struct termios t;

	if (!strcmp(name, "-")) {
		in_fd = 0, out_fd = 1;
		return;
	}
	/* Our controlling terminal (init gave us a session), so that no command becomes its owner
	   by opening it, and hangs it up at its end. */
	in_fd = out_fd = open(name, O_RDWR | O_CLOEXEC);
	if (in_fd < 0) {
		fprintf(stderr, "hvhost-probe: %s: %s\n", name, strerror(errno));
		sleep(1);  /* init would start us again at once */
		exit(1);
	}
	if (!tcgetattr(in_fd, &t)) {
		cfmakeraw(&t);
		cfsetspeed(&t, B115200);
		t.c_cflag |= CLOCAL | CREAD;
		t.c_cflag &= ~(CRTSCTS | HUPCL);
		t.c_cc[VMIN] = 1, t.c_cc[VTIME] = 0;
		tcsetattr(in_fd, TCSANOW, &t);
	}
}

/* Hyper-V sockets. */

static void run_and_wait(char **argv);

static int listen_socket(unsigned port)
{
	struct sockaddr_vm address = {
		.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port
	};
	int fd;

	run_and_wait((char *[]){ "/sbin/modprobe", "-q", "hv_sock", NULL });
	fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd >= 0 && !bind(fd, (struct sockaddr *)&address, sizeof address) && !listen(fd, 1024))
		return fd;
	fprintf(stderr, "hvhost-probe: port %u: %s\n", port, strerror(errno));
	return -1;
}

/* Tell who asks over the serial line whether to come over sockets instead; whole at once. */
static void tell_sockets(const char *text)
{
	FILE *file = fopen(SOCKETS_FILE ".new", "we");

	if (file && fputs(text, file) >= 0 && !fclose(file))
		rename(SOCKETS_FILE ".new", SOCKETS_FILE);
}

static void serve_sockets(void)
{
	int fd = listen_socket(SOCKET_PORT);

	tell_sockets(fd < 0 ? "none\n" : "listening\n");
	signal(SIGCHLD, SIG_IGN);
	while (fd >= 0) {
		int connection = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
		if (connection < 0) {
			usleep(10000);  /* out of something; a program that ends gives it back */
			continue;
		}
		if (fork() == 0) {
			signal(SIGCHLD, SIG_DFL);
			close(fd);
			in_fd = out_fd = connection;
			serve();
		}
		close(connection);
	}
	for (;;)  /* this kernel has no such sockets; init need not try again */
		pause();
}

/* Copy until the end of `from`; then `to` gets no more either. */
static int relay(int from, int to)
{
	static uint8_t buffer[1 << 16];
	ssize_t n;

	while ((n = read(from, buffer, sizeof buffer)) > 0)
		for (uint8_t *p = buffer; n > 0;) {
			ssize_t sent = write(to, p, n);
			if (sent < 0)
				return errno;
			p += sent, n -= sent;
		}
	if (n < 0)
		return errno;
	shutdown(to, SHUT_WR);  /* fails where it is no socket */
	return 0;
}

static void echo_sockets(unsigned port)
{
	int fd = listen_socket(port);

	if (fd < 0)
		exit(1);
	signal(SIGCHLD, SIG_IGN);
	dprintf(1, "listening\n");
	for (;;) {
		int connection = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
		if (connection >= 0 && fork() == 0)
			exit(relay(connection, connection));
		close(connection);
	}
}

static int connect_socket(unsigned port)
{
	struct sockaddr_vm address = {
		.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port
	};
	int fd, error;
	pid_t child;

	run_and_wait((char *[]){ "/sbin/modprobe", "-q", "hv_sock", NULL });
	fd = socket(AF_VSOCK, SOCK_STREAM, 0);
	if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address)) {
		fprintf(stderr, "hvhost-probe: port %u: %s\n", port, strerror(errno));
		return 1;
	}
	child = fork();
	if (child == 0)
		_exit(relay(0, fd));
	error = relay(fd, 1);
	if (error)
		fprintf(stderr, "hvhost-probe: port %u: %s\n", port, strerror(error));
	kill(child, SIGKILL);
	return error ? 1 : 0;
}

/* Hotplug: what udev would do, for the few buses a Hyper-V guest has. */

static char *aliases[256];
static int alias_count;

/* A connection of hv_sock, whose driver is there or there would be none. With hundreds of them
   the guest would do nothing but start modprobe. */
static int is_connection(const char *alias)
{
	return !strncmp(alias, "vmbus:", 6) && strlen(alias) > 14 &&
	       !strcmp(alias + 14, "cbfae611bd5864006a7986d3");
}

static void add_alias(const char *text)
{
	if (is_connection(text))
		return;
	if (alias_count < 250 && *text)
		aliases[alias_count++] = strdup(text);
}

static void run_and_wait(char **argv)
{
	pid_t child = fork();
	int status;

	if (child == 0) {
		execv(argv[0], argv);
		_exit(127);
	}
	while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR)
		;
}

static void load_drivers(void)
{
	char *argv[260] = { "/sbin/modprobe", "-q", "-a" };

	if (!alias_count)
		return;
	memcpy(argv + 3, aliases, alias_count * sizeof *aliases);
	run_and_wait(argv);
	while (alias_count)
		free(aliases[--alias_count]);
}

/* Start the daemon of a device that came, once: it may be found and announced. Two daemons on UIO
   would both be given the device, and take each other's messages. */
static void start_daemon(const char *node)
{
	static const char *const known[][2] = {
		{ "vmbus/hv_kvp", "/usr/sbin/hv_kvp_daemon" },
		{ "vmbus/hv_vss", "/usr/sbin/hv_vss_daemon" },
		{ "vmbus/hv_fcopy", "/usr/sbin/hv_fcopy_daemon" },
		/* Newer kernels serve file copy through UIO; the daemon itself finds out which device. */
		{ "uio0", "/usr/sbin/hv_fcopy_uio_daemon" },
	};

	static ino_t served[sizeof known / sizeof *known]; /* a device that comes anew has a new one */
	char path[64];
	struct stat file;

	for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
		if (strcmp(node, known[i][0]) || access(known[i][1], X_OK))
			continue;
		snprintf(path, sizeof path, "/dev/%s", node);
		if (stat(path, &file) || file.st_ino == served[i])
			continue;
		served[i] = file.st_ino;
		run_and_wait((char *[]){ (char *)known[i][1], NULL });
	}
}

static void plug_existing(void)
{
	static const char *const patterns[] = {
		"/sys/bus/vmbus/devices/*/modalias", "/sys/bus/scsi/devices/*/modalias",
		"/sys/bus/hid/devices/*/modalias",   "/sys/bus/serio/devices/*/modalias",
		"/sys/bus/pci/devices/*/modalias",   "/sys/class/input/input*/modalias",
	};
	glob_t found;

	for (size_t i = 0; i < sizeof patterns / sizeof *patterns; i++) {
		if (glob(patterns[i], 0, NULL, &found))
			continue;
		for (size_t k = 0; k < found.gl_pathc; k++) {
			char text[1024];
			int fd = open(found.gl_pathv[k], O_RDONLY | O_CLOEXEC);
			ssize_t n = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
			if (fd >= 0)
				close(fd);
			text[n > 0 ? n : 0] = 0;
			text[strcspn(text, "\n")] = 0;
			add_alias(text);
		}
		globfree(&found);
		load_drivers();
	}
	if (!glob("/dev/{vmbus/*,uio0}", GLOB_BRACE, NULL, &found)) {
		for (size_t k = 0; k < found.gl_pathc; k++)
			start_daemon(found.gl_pathv[k] + strlen("/dev/"));
		globfree(&found);
	}
}

static void hotplug(void)
{
	struct sockaddr_nl address = { .nl_family = AF_NETLINK, .nl_groups = 1 };
	int fd = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC, NETLINK_KOBJECT_UEVENT);
	int size = 1 << 20;
	char event[8192];

	setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size);
	if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address)) {
		perror("hvhost-probe: hotplug");
		exit(1);
	}
	plug_existing();
	if (fork())
		exit(0);
	setsid();
	for (;;) {
		struct pollfd p = { .fd = fd, .events = POLLIN };

		/* Everything that is there already goes into one modprobe. */
		if (alias_count && poll(&p, 1, 0) <= 0)
			load_drivers();
		ssize_t n = recv(fd, event, sizeof event - 1, 0);
		if (n < 0) {
			if (errno == ENOBUFS)
				plug_existing();
			continue;
		}
		event[n] = 0;
		if (strncmp(event, "add@", 4))
			continue;
		for (char *p2 = event; p2 < event + n; p2 += strlen(p2) + 1) {
			if (!strncmp(p2, "MODALIAS=", 9))
				add_alias(p2 + 9);
			else if (!strncmp(p2, "DEVNAME=", 8))
				start_daemon(p2 + 8);
		}
	}
}

/* Return once the file is there. Looks again each second too: what is mounted over the directory
   meanwhile is not announced. */
static void wait_for(const char *path)
{
	struct pollfd watch = { .fd = inotify_init1(IN_CLOEXEC | IN_NONBLOCK), .events = POLLIN };
	char directory[4096], events[4096];
	const char *slash = strrchr(path, '/');

	snprintf(directory, sizeof directory, "%.*s", slash ? (int)(slash - path) : 1, slash ? path : ".");
	inotify_add_watch(watch.fd, *directory ? directory : "/", IN_CREATE | IN_MOVED_TO);
	while (access(path, F_OK))
		if (poll(&watch, 1, 1000) > 0)
			while (read(watch.fd, events, sizeof events) > 0)
				;
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "wait")) {
		wait_for(argv[2]);
		return 0;
	}
	if (argc == 3 && !strcmp(argv[1], "listen"))
		echo_sockets(strtoul(argv[2], NULL, 10));
	if (argc == 3 && !strcmp(argv[1], "connect"))
		return connect_socket(strtoul(argv[2], NULL, 10));
	if (argc != 2) {
		fprintf(stderr,
			"usage: hvhost-probe TTY | - | sockets | hotplug | listen PORT | connect PORT | "
			"wait FILE\n");
		return 2;
	}
	if (!strcmp(argv[1], "hotplug"))
		hotplug();
	signal(SIGPIPE, SIG_IGN);
	if (!strcmp(argv[1], "sockets"))
		serve_sockets();
	open_port(argv[1]);
	serve();
}
