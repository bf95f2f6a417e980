/* The shared memory between the VMM and the agent in the rig: one place for both sides.
 * layout.py reads the constants of this file; keep every line of the form `#define NAME value`.
 *
 * BAR 2 of the ivshmem device starts with the header page: magic, state words, and a table of
 * sessions. A session belongs to one VMM process and is one ivshmem peer. Its control block holds
 * a mailbox for set-up calls, one mailbox per virtual processor, and the rings of raised events.
 *
 * A mailbox is owned by the agent while its state is MAILBOX_REQUEST and by the VMM otherwise.
 */
#define RIG_MAGIC 0x67697248
#define RIG_VERSION 1

/* header page, byte offsets */
#define HEADER_MAGIC 0
#define HEADER_VERSION 4
#define HEADER_AGENT_READY 8
#define HEADER_PING 12
#define HEADER_PONG 16
#define HEADER_SESSIONS 1024
#define SESSION_ENTRY_SIZE 16
#define MAXIMUM_SESSIONS 32

/* session entry, byte offsets */
#define SESSION_STATE 0
#define SESSION_PEER 4
#define SESSION_CONTROL 8

#define SESSION_FREE 0
#define SESSION_OPENING 1
#define SESSION_OPEN 2
#define SESSION_CLOSING 3

/* MSI-X vectors of the device: 0 wakes the agent's main thread, 1 + n the thread of session n,
 * the rest are lent to sessions as interrupts towards their guests. */
#define VECTORS 160
#define FIRST_FREE_VECTOR 33

/* doorbell vectors of a peer: 0 tells of raised events, 1 + n of virtual processor n, the last of
 * finished set-up calls */
#define MAXIMUM_PROCESSORS 64
#define CONTROL_DOORBELL 65
#define PEER_VECTORS 66

/* control block, byte offsets */
#define CONTROL_MAILBOX 0x1000
#define CONTROL_BUFFER_SIZE 0x6000
#define CONTROL_RAISED_HEAD 0x10
#define CONTROL_RAISED_TAIL 0x14
#define CONTROL_ASLEEP 0x18
#define CONTROL_RAISED_RING 0x400
#define RAISED_RING_ENTRIES 512
#define CONTROL_QUEUED 0xc00
#define MAXIMUM_IN_EVENTS 512
#define CONTROL_COALESCED 0xe000
#define COALESCED_SIZE 0x1000
#define CONTROL_PROCESSORS 0x10000
#define PROCESSOR_STRIDE 0x8000
#define PROCESSOR_BUFFER_SIZE 0x4000
#define PROCESSOR_RUN 0x6000
#define RUN_IMAGE_SIZE 0x2000
#define CONTROL_SIZE 0x210000

/* mailbox, byte offsets; the argument buffer follows at MAILBOX_BUFFER */
#define MAILBOX_STATE 0
#define MAILBOX_OPERATION 4
#define MAILBOX_TARGET 8
#define MAILBOX_RESULT_HANDLE 12
#define MAILBOX_REQUEST_CODE 16
#define MAILBOX_ARGUMENT 24
#define MAILBOX_USES_BUFFER 32
#define MAILBOX_FIXUPS 36
#define MAILBOX_RESULT 40
#define MAILBOX_ASLEEP 48
#define MAILBOX_FIXUP_TABLE 64
#define MAILBOX_BUFFER 0x1000
#define FIXUP_SIZE 16
#define MAXIMUM_FIXUPS 16

#define MAILBOX_IDLE 0
#define MAILBOX_REQUEST 1
#define MAILBOX_DONE 2

#define OPERATION_IOCTL 1
#define OPERATION_RUN 2
#define OPERATION_OPEN_KVM 3
#define OPERATION_VECTOR_EVENT 4
#define OPERATION_IN_EVENT 5
#define OPERATION_CLOSE 6
#define OPERATION_START_PROCESSOR 7
#define OPERATION_KICK 8
#define OPERATION_DRAIN_COALESCED 9
#define OPERATION_REWRITE 10

/* fixups: what the agent puts into the argument buffer before the call */
#define FIXUP_ADD_BAR 1
#define FIXUP_DESCRIPTOR 2
#define FIXUP_ADD_BUFFER 3

#define NO_HANDLE 0xffffffff
#define MAXIMUM_HANDLES 1024
