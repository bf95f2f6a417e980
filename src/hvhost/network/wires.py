"""What adapters are plugged into: descriptors that take and give one frame at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable
from typing import Final

from hvhost.errors import HvHostError
from hvhost.machine.loop import Loop
from hvhost.network.transmit import Buffers

# linux/if_tun.h
TUNSETIFF: Final = 0x400454CA
TUNSETOFFLOAD: Final = 0x400454D0
TUNSETVNETHDRSZ: Final = 0x400454D8
IFF_TAP: Final = 0x0002
IFF_NO_PI: Final = 0x1000
IFF_VNET_HDR: Final = 0x4000
TUN_F_CSUM: Final = 0x01
TUN_F_TSO4: Final = 0x02
TUN_F_TSO6: Final = 0x04
TUN_F_TSO_ECN: Final = 0x08

_IFREQ = struct.Struct("16sH22x")
#: The kernel's answers to a frame that it will never take: bad headers, a link that is down.
_REFUSED: Final = (errno.EINVAL, errno.EIO, errno.EMSGSIZE, errno.ENOBUFS, errno.ENOMEM)


def check_tap(name: str) -> None:
    """:class:`HvHostError`, with how to make one, if there is no network device *name*.

    The kernel would make one that is in no bridge and goes with us.
    """
    try:
        socket.if_nametoindex(name)
    except OSError:
        raise HvHostError(
            f"there is no tap device {name!r}; as root, `ip tuntap add {name} mode tap vnet_hdr "
            f"user {os.getuid()}` makes it, and `ip link set {name} master BRIDGE up` plugs it in."
        ) from None


def open_tap(name: str, *, make: bool = False) -> int:
    """A descriptor of tap device *name*, which leaves work to us; one that goes with it if *make*.

    :class:`HvHostError` if it does not exist or the kernel refuses, with what to do.
    """
    if not make:
        check_tap(name)
    try:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise HvHostError(
            f"/dev/net/tun cannot be opened: {error.strerror}; load the module tun and see that "
            "you may read and write the file."
        ) from error
    try:
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
        fcntl.ioctl(descriptor, TUNSETIFF, _IFREQ.pack(name.encode(), flags))
        fcntl.ioctl(descriptor, TUNSETVNETHDRSZ, struct.pack("i", 10))
        fcntl.ioctl(descriptor, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN)
    except OSError as error:
        os.close(descriptor)
        raise HvHostError(
            f"the tap device {name!r} cannot be used: {error.strerror}; make it for yourself with "
            f"`ip tuntap add {name} mode tap vnet_hdr user {os.getuid()}`, as root."
        ) from error
    return descriptor


class DescriptorWire:
    """A wire of one descriptor: a tap device with offload headers, or a switch's socket.

    *readable* and *writable* are called on *loop*; *gone* when the other side has hung up.
    """

    def __init__(
        self,
        descriptor: int,
        loop: Loop,
        *,
        readable: Callable[[], None],
        writable: Callable[[], None],
        gone: Callable[[], None] = lambda: None,
    ) -> None:
        self._descriptor, self._loop = descriptor, loop
        self._readable, self._writable, self._gone = readable, writable, gone
        self._interest: tuple[bool, bool] | None = None
        self._closed = False
        self.dropped = 0

    def send(self, buffers: Buffers) -> bool:
        if self._closed:
            return True
        try:
            os.writev(self._descriptor, buffers)
        except BlockingIOError:
            return False
        except OSError as error:
            self.dropped += 1
            if error.errno not in _REFUSED:
                self._hung_up()
        return True

    def receive_into(self, buffers: list[memoryview]) -> int:
        if self._closed:
            return 0
        try:
            size = os.readv(self._descriptor, buffers)
        except BlockingIOError:
            return 0
        except OSError:
            size = 0
        if not size:
            self._hung_up()
        return size

    def watch(self, *, read: bool, write: bool) -> None:
        wanted = read, write
        if self._closed or wanted == self._interest:
            return
        self._interest = wanted
        if not read and not write:
            self._loop.remove(self._descriptor)
        else:
            self._loop.watch(self._descriptor, self._ready, read=read, write=write)

    def _ready(self) -> None:
        interest = self._interest
        if interest is None or self._closed:
            return
        if interest[1]:
            self._writable()
        if interest[0] and not self._closed:
            self._readable()

    def _hung_up(self) -> None:
        self.close()
        self._gone()

    def close(self) -> None:
        """Give the descriptor back; what is sent from now on is lost."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove(self._descriptor)
        os.close(self._descriptor)


class NoWire:
    """Nothing: an adapter without a plug."""

    def send(self, buffers: Buffers) -> bool:
        return True

    def receive_into(self, buffers: list[memoryview]) -> int:
        return 0

    def watch(self, *, read: bool, write: bool) -> None:
        pass

    def close(self) -> None:
        pass


def enlarge(connection: socket.socket) -> None:
    """Room for many frames on their way, as far as the kernel lets us."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, option, 4 << 20)
