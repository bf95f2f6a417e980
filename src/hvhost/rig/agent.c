/* The agent: the only process of the rig. It carries out KVM calls for VMM processes on the host.
 *
 * It owns the ivshmem device through VFIO: BAR 2 is the memory shared with the host (guest RAM and
 * mailboxes, see layout.h), BAR 0 the doorbell that raises eventfds on the host, and each MSI-X
 * vector an eventfd that the host raises, which can be given to KVM_IRQFD as it is.
 *
 * One main thread (sessions come and go), one thread per session (set-up calls, events raised by
 * KVM), one thread per virtual processor (KVM_RUN and the calls that belong to it). */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/kvm.h>
#include <linux/vfio.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
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
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "layout.h"

#define PAGE_SIZE 4096 /* wanted by KVM_COALESCED_MMIO_MAX */
#define DOORBELL 12
#define SPIN_CYCLES 400000ull /* about 0.2 ms: longer than an exit takes to be answered */
#define WAKE_TAG 0xffffffffu

struct session;

struct processor {
	struct session *session;
	unsigned index;
	int fd, started;
	pthread_t thread;
	struct kvm_run *run;
	uint8_t *mailbox;
};

struct session {
	unsigned index, peer;
	uint8_t *control;
	pthread_t thread;
	int epoll, stopping, run_size;
	int handles[MAXIMUM_HANDLES];
	uint8_t borrowed[MAXIMUM_HANDLES]; /* a vector's eventfd: not ours to close */
	struct kvm_coalesced_mmio_ring *coalesced;
	pthread_mutex_t lock;
	struct processor processors[MAXIMUM_PROCESSORS];
};

static uint8_t *bar;
static volatile uint32_t *doorbell_registers;
static int device = -1;
static uint64_t doorbell_offset;
static int vector_event[VECTORS];
static struct session *sessions[MAXIMUM_SESSIONS];

static void say(const char *format, ...)
{
	char line[256];
	va_list arguments;
	va_start(arguments, format);
	int length = vsnprintf(line, sizeof line - 1, format, arguments);
	va_end(arguments);
	if (length > (int)sizeof line - 2)
		length = sizeof line - 2;
	line[length++] = '\n';
	if (write(1, line, length) < 0)
		return;
}

static void die(const char *what)
{
	say("hvhost-agent: %s: %s", what, strerror(errno));
	sync();
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

static inline uint32_t get32(const uint8_t *base, unsigned offset)
{
	return __atomic_load_n((const uint32_t *)(base + offset), __ATOMIC_SEQ_CST);
}

static inline void put32(uint8_t *base, unsigned offset, uint32_t value)
{
	__atomic_store_n((uint32_t *)(base + offset), value, __ATOMIC_SEQ_CST);
}

static inline uint64_t get64(const uint8_t *base, unsigned offset)
{
	return *(const volatile uint64_t *)(base + offset);
}

static void ring_doorbell(unsigned peer, unsigned vector)
{
	uint32_t value = peer << 16 | vector;
	if (doorbell_registers)
		doorbell_registers[DOORBELL / 4] = value;
	else if (pwrite(device, &value, 4, doorbell_offset + DOORBELL) != 4)
		say("hvhost-agent: doorbell: %s", strerror(errno));
}

/* --- events raised by KVM: eventfd -> ring in shared memory -> doorbell ----------------------- */

static void raise_event(struct session *s, unsigned index)
{
	uint8_t *queued = s->control + CONTROL_QUEUED + index;
	if (__atomic_exchange_n(queued, 1, __ATOMIC_SEQ_CST))
		return; /* the VMM has not looked at the last one yet */
	uint32_t head = get32(s->control, CONTROL_RAISED_HEAD);
	put32(s->control, CONTROL_RAISED_RING + 4 * (head % RAISED_RING_ENTRIES), index);
	put32(s->control, CONTROL_RAISED_HEAD, head + 1);
	ring_doorbell(s->peer, 0);
}

/* --- coalesced port writes: from KVM's ring to the one the VMM sees --------------------------- */

static void drain_coalesced(struct session *s)
{
	struct kvm_coalesced_mmio_ring *from = s->coalesced, *to = (void *)(s->control + CONTROL_COALESCED);
	const uint32_t from_entries = KVM_COALESCED_MMIO_MAX;
	const uint32_t to_entries = (COALESCED_SIZE - sizeof *to) / sizeof to->coalesced_mmio[0];
	if (!from || from->first == __atomic_load_n(&from->last, __ATOMIC_ACQUIRE))
		return;
	pthread_mutex_lock(&s->lock);
	uint32_t first = from->first % from_entries, last = to->last % to_entries;
	while (first != __atomic_load_n(&from->last, __ATOMIC_ACQUIRE)) {
		if ((last + 1) % to_entries == __atomic_load_n(&to->first, __ATOMIC_ACQUIRE) % to_entries)
			break;
		to->coalesced_mmio[last] = from->coalesced_mmio[first];
		last = (last + 1) % to_entries;
		first = (first + 1) % from_entries;
		__atomic_store_n(&to->last, last, __ATOMIC_RELEASE);
		__atomic_store_n(&from->first, first, __ATOMIC_RELEASE);
	}
	pthread_mutex_unlock(&s->lock);
}

/* --- calls ------------------------------------------------------------------------------------ */

static int descriptor(struct session *s, uint32_t handle)
{
	return handle < MAXIMUM_HANDLES ? s->handles[handle] : -1;
}

static int64_t keep(struct session *s, uint32_t handle, int fd, int borrowed)
{
	if (fd < 0)
		return -errno;
	if (handle >= MAXIMUM_HANDLES || s->handles[handle] >= 0) {
		if (!borrowed)
			close(fd);
		return -EBADF;
	}
	s->handles[handle] = fd;
	s->borrowed[handle] = borrowed;
	return 0;
}

static int64_t call_ioctl(struct session *s, uint8_t *mailbox, uint32_t buffer_size)
{
	uint8_t *buffer = mailbox + MAILBOX_BUFFER;
	uint32_t fixups = get32(mailbox, MAILBOX_FIXUPS), handle = get32(mailbox, MAILBOX_RESULT_HANDLE);
	if (fixups > MAXIMUM_FIXUPS)
		return -EINVAL;
	for (uint32_t i = 0; i < fixups; i++) {
		const uint8_t *fixup = mailbox + MAILBOX_FIXUP_TABLE + i * FIXUP_SIZE;
		uint32_t offset = get32(fixup, 0), kind = get32(fixup, 4);
		uint64_t value = get64(fixup, 8);
		if (offset > buffer_size - 8)
			return -EINVAL;
		if (kind == FIXUP_ADD_BAR)
			*(uint64_t *)(buffer + offset) = (uintptr_t)bar + value;
		else if (kind == FIXUP_ADD_BUFFER)
			*(uint64_t *)(buffer + offset) = (uintptr_t)buffer + value;
		else if (kind == FIXUP_DESCRIPTOR)
			*(uint32_t *)(buffer + offset) = descriptor(s, value);
		else
			return -EINVAL;
	}
	unsigned long argument = get32(mailbox, MAILBOX_USES_BUFFER) ? (unsigned long)buffer
								    : get64(mailbox, MAILBOX_ARGUMENT);
	int result = ioctl(descriptor(s, get32(mailbox, MAILBOX_TARGET)), get64(mailbox, MAILBOX_REQUEST_CODE), argument);
	if (result < 0)
		return -errno;
	if (handle == NO_HANDLE)
		return result;
	return keep(s, handle, result, 0);
}

static void *processor_main(void *argument);

/* Write what is there once more. The host wrote it behind the emulator's back; a store from in here
 * makes the emulator forget the code it translated from what was there before. */
static void rewrite(uint64_t offset, uint64_t size)
{
	volatile uint8_t *byte = bar + offset, *end = byte + size;
	for (; byte < end && (uintptr_t)byte % sizeof(uint64_t); byte++)
		*byte = *byte;
	for (; end - byte >= (ptrdiff_t)sizeof(uint64_t); byte += sizeof(uint64_t))
		*(volatile uint64_t *)byte = *(volatile uint64_t *)byte;
	for (; byte < end; byte++)
		*byte = *byte;
}

/* So for many places: their offsets and sizes in pairs. */
static int64_t rewrite_all(const uint8_t *pairs, uint64_t count, uint32_t buffer_size)
{
	if (count > buffer_size / 16)
		return -EINVAL;
	for (uint64_t i = 0; i < count; i++)
		rewrite(get64(pairs, 16 * i), get64(pairs, 16 * i + 8));
	return 0;
}

/* Those of the rig that may run guests: all but the first, see qemu.py. Empty if there is one only. */
static cpu_set_t guest_processors;

static int start_thread(struct processor *p)
{
	pthread_attr_t attributes;
	pthread_attr_init(&attributes);
	if (CPU_COUNT(&guest_processors))
		pthread_attr_setaffinity_np(&attributes, sizeof guest_processors, &guest_processors);
	int error = pthread_create(&p->thread, &attributes, processor_main, p);
	pthread_attr_destroy(&attributes);
	return error;
}

static int64_t start_processor(struct session *s, unsigned index, int fd)
{
	if (index >= MAXIMUM_PROCESSORS || s->processors[index].started)
		return -EINVAL;
	struct processor *p = &s->processors[index];
	void *run = mmap(NULL, s->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (run == MAP_FAILED)
		return -errno;
	p->session = s;
	p->index = index;
	p->fd = fd;
	p->run = run;
	p->mailbox = s->control + CONTROL_PROCESSORS + index * PROCESSOR_STRIDE;
	if (!s->coalesced && s->run_size >= 3 * 4096)
		s->coalesced = (void *)((uint8_t *)run + KVM_COALESCED_MMIO_PAGE_OFFSET * 4096);
	memcpy(p->mailbox + PROCESSOR_RUN, run, RUN_IMAGE_SIZE);
	p->started = 1;
	return -start_thread(p);
}

static int64_t call(struct session *s, uint8_t *mailbox, uint32_t buffer_size)
{
	uint32_t target = get32(mailbox, MAILBOX_TARGET), handle = get32(mailbox, MAILBOX_RESULT_HANDLE);
	uint64_t argument = get64(mailbox, MAILBOX_ARGUMENT);
	switch (get32(mailbox, MAILBOX_OPERATION)) {
	case OPERATION_IOCTL:
		return call_ioctl(s, mailbox, buffer_size);
	case OPERATION_OPEN_KVM: {
		int64_t result = keep(s, handle, open("/dev/kvm", O_RDWR | O_CLOEXEC), 0);
		if (result == 0)
			s->run_size = ioctl(s->handles[handle], KVM_GET_VCPU_MMAP_SIZE, 0);
		return result;
	}
	case OPERATION_VECTOR_EVENT:
		if (argument < FIRST_FREE_VECTOR || argument >= VECTORS)
			return -EINVAL;
		return keep(s, handle, vector_event[argument], 1);
	case OPERATION_IN_EVENT: {
		if (argument >= MAXIMUM_IN_EVENTS)
			return -EINVAL;
		int fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
		struct epoll_event event = { .events = EPOLLIN, .data.u64 = (uint64_t)fd << 32 | argument };
		if (fd < 0 || epoll_ctl(s->epoll, EPOLL_CTL_ADD, fd, &event) < 0)
			return -errno;
		return keep(s, handle, fd, 0);
	}
	case OPERATION_CLOSE:
		if (descriptor(s, target) < 0)
			return -EBADF;
		if (!s->borrowed[target])
			close(s->handles[target]);
		s->handles[target] = -1;
		return 0;
	case OPERATION_START_PROCESSOR:
		return start_processor(s, argument, descriptor(s, target));
	case OPERATION_KICK:
		if (argument >= MAXIMUM_PROCESSORS || !s->processors[argument].started)
			return -EINVAL;
		s->processors[argument].run->immediate_exit = 1;
		return -pthread_kill(s->processors[argument].thread, SIGUSR1);
	case OPERATION_DRAIN_COALESCED:
		drain_coalesced(s);
		return 0;
	case OPERATION_REWRITE:
		if (get32(mailbox, MAILBOX_USES_BUFFER))
			return rewrite_all(mailbox + MAILBOX_BUFFER, get64(mailbox, MAILBOX_REQUEST_CODE), buffer_size);
		rewrite(argument, get64(mailbox, MAILBOX_REQUEST_CODE));
		return 0;
	}
	return -ENOSYS;
}

/* --- a virtual processor ---------------------------------------------------------------------- */

#define UNION_START 32 /* offset of the exit union in struct kvm_run; it is 256 bytes long */
#define UNION_SIZE 256

static int64_t run_processor(struct processor *p)
{
	uint8_t *run = (uint8_t *)p->run, *image = p->mailbox + PROCESSOR_RUN;
	run[0] = image[0]; /* request_interrupt_window */
	memcpy(run + UNION_START, image + UNION_START, UNION_SIZE);
	if (p->run->exit_reason == KVM_EXIT_IO && p->run->io.direction == KVM_EXIT_IO_IN)
		memcpy(run + 4096, image + 4096, (p->run->io.count * p->run->io.size) & 4095);
	int64_t result = ioctl(p->fd, KVM_RUN, 0) < 0 ? -errno : 0;
	p->run->immediate_exit = 0;
	drain_coalesced(p->session);
	memcpy(image, run, UNION_START + UNION_SIZE);
	if (p->run->exit_reason == KVM_EXIT_IO && p->run->io.direction == KVM_EXIT_IO_OUT)
		memcpy(image + 4096, run + 4096, (p->run->io.count * p->run->io.size) & 4095);
	return result;
}

/* Wait until the mailbox is ours: spin, since most answers come within microseconds, then sleep. */
static int await_request(struct session *s, uint8_t *mailbox)
{
	uint64_t start = __builtin_ia32_rdtsc();
	while (get32(mailbox, MAILBOX_STATE) != MAILBOX_REQUEST) {
		if (s->stopping)
			return -1;
		if (__builtin_ia32_rdtsc() - start < SPIN_CYCLES) {
			__builtin_ia32_pause();
			continue;
		}
		put32(mailbox, MAILBOX_ASLEEP, 1);
		if (get32(mailbox, MAILBOX_STATE) != MAILBOX_REQUEST && !s->stopping)
			syscall(SYS_futex, mailbox + MAILBOX_ASLEEP, FUTEX_WAIT_PRIVATE, 1, NULL, NULL, 0);
		put32(mailbox, MAILBOX_ASLEEP, 0);
		start = __builtin_ia32_rdtsc();
	}
	return 0;
}

static void *processor_main(void *argument)
{
	struct processor *p = argument;
	while (await_request(p->session, p->mailbox) == 0) {
		int64_t result;
		if (get32(p->mailbox, MAILBOX_OPERATION) == OPERATION_RUN)
			result = run_processor(p);
		else
			result = call(p->session, p->mailbox, PROCESSOR_BUFFER_SIZE);
		*(volatile int64_t *)(p->mailbox + MAILBOX_RESULT) = result;
		put32(p->mailbox, MAILBOX_STATE, MAILBOX_DONE);
		ring_doorbell(p->session->peer, 1 + p->index);
	}
	return NULL;
}

static void wake_processors(struct session *s)
{
	for (unsigned i = 0; i < MAXIMUM_PROCESSORS; i++) {
		struct processor *p = &s->processors[i];
		if (!p->started || !get32(p->mailbox, MAILBOX_ASLEEP))
			continue;
		if (s->stopping || get32(p->mailbox, MAILBOX_STATE) == MAILBOX_REQUEST) {
			put32(p->mailbox, MAILBOX_ASLEEP, 0);
			syscall(SYS_futex, p->mailbox + MAILBOX_ASLEEP, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
		}
	}
}

/* --- a session -------------------------------------------------------------------------------- */

static void end_session(struct session *s)
{
	for (unsigned i = 0; i < MAXIMUM_PROCESSORS; i++) {
		struct processor *p = &s->processors[i];
		if (!p->started)
			continue;
		for (;;) { /* the processor may be anywhere: in the guest, spinning, asleep */
			struct timespec deadline;
			p->run->immediate_exit = 1;
			pthread_kill(p->thread, SIGUSR1);
			put32(p->mailbox, MAILBOX_ASLEEP, 0);
			syscall(SYS_futex, p->mailbox + MAILBOX_ASLEEP, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
			clock_gettime(CLOCK_REALTIME, &deadline);
			deadline.tv_nsec += 20000000;
			if (deadline.tv_nsec >= 1000000000) {
				deadline.tv_nsec -= 1000000000;
				deadline.tv_sec++;
			}
			if (pthread_timedjoin_np(p->thread, NULL, &deadline) == 0)
				break;
		}
	}
	for (unsigned i = 0; i < MAXIMUM_PROCESSORS; i++) /* the first one's holds a ring for all */
		if (s->processors[i].started)
			munmap(s->processors[i].run, s->run_size);
	for (unsigned i = 0; i < MAXIMUM_HANDLES; i++)
		if (s->handles[i] >= 0 && !s->borrowed[i])
			close(s->handles[i]);
	close(s->epoll);
}

static void *session_main(void *argument)
{
	struct session *s = argument;
	uint8_t *mailbox = s->control + CONTROL_MAILBOX;
	uint64_t count, last_work = __builtin_ia32_rdtsc();
	while (!s->stopping) {
		struct epoll_event events[32];
		int spinning = __builtin_ia32_rdtsc() - last_work < SPIN_CYCLES;
		if (!spinning) {
			put32(s->control, CONTROL_ASLEEP, 1);
			if (get32(mailbox, MAILBOX_STATE) == MAILBOX_REQUEST)
				spinning = 1;
		}
		int ready = 0;
		if (!spinning)
			ready = epoll_wait(s->epoll, events, 32, -1);
		put32(s->control, CONTROL_ASLEEP, 0);
		for (int i = 0; i < ready; i++) {
			int fd = events[i].data.u64 >> 32;
			uint32_t tag = events[i].data.u64;
			if (read(fd, &count, 8) != 8)
				continue;
			if (tag == WAKE_TAG)
				wake_processors(s);
			else
				raise_event(s, tag);
		}
		if (get32(mailbox, MAILBOX_STATE) == MAILBOX_REQUEST) {
			*(volatile int64_t *)(mailbox + MAILBOX_RESULT) = call(s, mailbox, CONTROL_BUFFER_SIZE);
			put32(mailbox, MAILBOX_STATE, MAILBOX_DONE);
			ring_doorbell(s->peer, CONTROL_DOORBELL);
			last_work = __builtin_ia32_rdtsc();
		}
	}
	end_session(s);
	return NULL;
}

static void open_session(unsigned index, uint8_t *entry)
{
	struct session *s = calloc(1, sizeof *s);
	if (!s)
		die("memory for a session");
	s->index = index;
	s->peer = get32(entry, SESSION_PEER);
	s->control = bar + get64(entry, SESSION_CONTROL);
	memset(s->handles, 0xff, sizeof s->handles);
	pthread_mutex_init(&s->lock, NULL);
	s->epoll = epoll_create1(EPOLL_CLOEXEC);
	int wake = vector_event[1 + index];
	struct epoll_event event = { .events = EPOLLIN, .data.u64 = (uint64_t)wake << 32 | WAKE_TAG };
	if (s->epoll < 0 || epoll_ctl(s->epoll, EPOLL_CTL_ADD, wake, &event) < 0)
		die("epoll");
	sessions[index] = s;
	if (pthread_create(&s->thread, NULL, session_main, s))
		die("thread of a session");
	put32(entry, SESSION_STATE, SESSION_OPEN);
}

static void close_session(unsigned index, uint8_t *entry)
{
	struct session *s = sessions[index];
	uint64_t one = 1;
	if (s) {
		s->stopping = 1;
		if (write(vector_event[1 + index], &one, 8) != 8)
			say("hvhost-agent: waking session %u: %s", index, strerror(errno));
		pthread_join(s->thread, NULL);
		free(s);
		sessions[index] = NULL;
	}
	put32(entry, SESSION_STATE, SESSION_FREE);
}

/* --- start ------------------------------------------------------------------------------------ */

static void on_signal(int number) { (void)number; }

static void load_modules(void)
{
	char line[256];
	FILE *list = fopen("/modules", "r");
	if (!list)
		die("/modules");
	while (fgets(line, sizeof line, list)) {
		line[strcspn(line, "\n")] = 0;
		char *parameters = strchr(line, ' ');
		if (parameters)
			*parameters++ = 0;
		int fd = open(line, O_RDONLY | O_CLOEXEC);
		if (fd < 0 || (syscall(SYS_finit_module, fd, parameters ? parameters : "", 0) < 0 && errno != EEXIST))
			die(line);
		close(fd);
	}
	fclose(list);
}

/* KVM patches kernel text when the first virtual machine comes and the last goes, and whenever the
 * number of virtual APICs switched off by their base register, or by software, leaves or returns to
 * zero. Under emulation a processor may run into the breakpoint of such a patch after it was taken
 * away, and the kernel dies. So a machine of one APIC of each kind, which never runs, is made while
 * there is only one processor, and kept. */
static void keep_kernel_text(void)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	int machine = kvm < 0 ? -1 : ioctl(kvm, KVM_CREATE_VM, 0);
	if (machine < 0 || ioctl(machine, KVM_CREATE_IRQCHIP, 0) < 0)
		die("KVM");
	for (int i = 0; i < 2; i++) {
		struct kvm_sregs registers;
		int processor = ioctl(machine, KVM_CREATE_VCPU, i);
		if (processor < 0 || ioctl(processor, KVM_GET_SREGS, &registers) < 0)
			die("KVM processor");
		if (i == 0)
			registers.apic_base &= ~(1ull << 11);
		if (ioctl(processor, KVM_SET_SREGS, &registers) < 0)
			die("KVM registers");
	}
}

/* The kernel was started with one processor; see qemu.py. */
static void start_other_processors(void)
{
	char path[64];
	for (int i = 1;; i++) {
		snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/online", i);
		int fd = open(path, O_WRONLY | O_CLOEXEC);
		if (fd < 0)
			return;
		if (write(fd, "1", 1) == 1)
			CPU_SET(i, &guest_processors);
		else
			say("hvhost-agent: processor %d: %s", i, strerror(errno));
		close(fd);
	}
}

static void tell_guest_processors(void)
{
	char list[256] = "";
	int length = 0;
	for (int i = 0; i < CPU_SETSIZE && length < (int)sizeof list; i++)
		if (CPU_ISSET(i, &guest_processors))
			length += snprintf(list + length, sizeof list - length, " %d", i);
	say("hvhost-agent: processors for guests:%s", list);
}

/* A device's region at an address that lets the kernel map it, and KVM the guest's memory in it, by
 * large pages: Linux does from 6.12 on, where address and place in the region agree. */
static uint8_t *map_aligned(int file, uint64_t offset, uint64_t size)
{
	uint64_t alignment = 1ul << 30;
	void *room = mmap(NULL, size + alignment, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (room == MAP_FAILED)
		die("room for the shared memory");
	void *start = (void *)(((uintptr_t)room + alignment - 1) & ~(alignment - 1));
	void *mapped = mmap(start, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, offset);
	if (mapped == MAP_FAILED)
		die("mapping the shared memory");
	return mapped;
}

/* Linux does without large pages where there is less than 512 MiB of memory, as here. */
static void allow_large_pages(void)
{
	int fd = open("/sys/kernel/mm/transparent_hugepage/enabled", O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, "always", 6) != 6)
		say("hvhost-agent: no large pages: %s", strerror(errno));
	if (fd >= 0)
		close(fd);
}

static void open_device(void)
{
	int container = open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC), group = -1;
	char path[64];
	for (int i = 0; i < 64 && group < 0; i++) {
		snprintf(path, sizeof path, "/dev/vfio/%d", i);
		group = open(path, O_RDWR | O_CLOEXEC);
	}
	if (container < 0 || group < 0)
		die("the ivshmem device's IOMMU group");
	if (ioctl(group, VFIO_GROUP_SET_CONTAINER, &container) < 0 ||
	    ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU) < 0)
		die("VFIO container");
	device = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, getenv("hvhost_device") ?: "0000:00:03.0");
	if (device < 0)
		die("VFIO device");

	struct vfio_region_info shared = { .argsz = sizeof shared, .index = VFIO_PCI_BAR2_REGION_INDEX };
	struct vfio_region_info registers = { .argsz = sizeof registers, .index = VFIO_PCI_BAR0_REGION_INDEX };
	if (ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &shared) < 0 ||
	    ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &registers) < 0)
		die("VFIO regions");
	bar = map_aligned(device, shared.offset, shared.size);
	doorbell_offset = registers.offset;
	void *mapped = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, device, registers.offset);
	doorbell_registers = mapped == MAP_FAILED ? NULL : mapped;
	if (!doorbell_registers)
		say("hvhost-agent: doorbell by system call: %s", strerror(errno));

	char space[sizeof(struct vfio_irq_set) + sizeof vector_event];
	struct vfio_irq_set *set = (void *)space;
	for (int i = 0; i < VECTORS; i++)
		if ((vector_event[i] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) < 0)
			die("eventfd");
	set->argsz = sizeof space;
	set->flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
	set->index = VFIO_PCI_MSIX_IRQ_INDEX;
	set->start = 0;
	set->count = VECTORS;
	memcpy(set->data, vector_event, sizeof vector_event);
	if (ioctl(device, VFIO_DEVICE_SET_IRQS, set) < 0)
		die("MSI-X vectors");
	uint16_t command = 0; /* bus mastering, or MSI-X messages go nowhere */
	struct vfio_region_info config = { .argsz = sizeof config, .index = VFIO_PCI_CONFIG_REGION_INDEX };
	if (ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &config) < 0 || pread(device, &command, 2, config.offset + 4) != 2)
		die("PCI configuration");
	command |= 6;
	if (pwrite(device, &command, 2, config.offset + 4) != 2)
		die("PCI configuration");
}

/* Sessions come and go; everything else has threads of its own. */
static void __attribute__((noreturn)) serve(void)
{
	if (get32(bar, HEADER_MAGIC) != RIG_MAGIC || get32(bar, HEADER_VERSION) != RIG_VERSION) {
		errno = EPROTO;
		die("the shared memory is not the rig's");
	}
	put32(bar, HEADER_AGENT_READY, 1);
	say("hvhost-agent: ready");
	ring_doorbell(1, 0);
	for (;;) {
		uint64_t count;
		struct pollfd wait = { .fd = vector_event[0], .events = POLLIN };
		poll(&wait, 1, -1);
		if (read(vector_event[0], &count, 8) < 0 && errno != EAGAIN)
			die("wake vector");
		put32(bar, HEADER_PONG, get32(bar, HEADER_PING));
		for (unsigned i = 0; i < MAXIMUM_SESSIONS; i++) {
			uint8_t *entry = bar + HEADER_SESSIONS + i * SESSION_ENTRY_SIZE;
			uint32_t state = get32(entry, SESSION_STATE);
			if (state == SESSION_OPENING)
				open_session(i, entry);
			else if (state == SESSION_CLOSING)
				close_session(i, entry);
		}
		ring_doorbell(1, 0);
	}
}

int main(void)
{
	if (getpid() != 1) { /* `rig exec` starts it for this alone, beside a process that goes on */
		keep_kernel_text();
		if (fork() == 0)
			for (;;)
				pause();
		return 0;
	}
	mkdir("/dev", 0755);
	mkdir("/sys", 0755);
	mount("dev", "/dev", "devtmpfs", 0, "");
	mount("sys", "/sys", "sysfs", 0, "");
	int console = open("/dev/ttyS0", O_RDWR | O_NOCTTY);
	if (console >= 0) {
		dup2(console, 1);
		dup2(console, 2);
	}
	struct sigaction action = { .sa_handler = on_signal };
	sigaction(SIGUSR1, &action, NULL);
	signal(SIGPIPE, SIG_IGN);
	load_modules();
	keep_kernel_text();
	start_other_processors();
	tell_guest_processors();
	allow_large_pages();
	open_device();
	serve();
}
