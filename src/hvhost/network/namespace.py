"""A network namespace of one's own with a tap device in it; needs no rights.

Started as ``unshare --user --map-root-user --net python -m hvhost.network.namespace SOCKET_FD …``,
without a user namespace where root may make none, as in a chroot and in some containers:
makes the devices, hands their descriptors over the socket, and holds the namespace until the socket
is closed. The kernel in there is the other end of each tap; addresses and names are given out there
if that is asked for.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from hvhost.errors import HvHostError

_READY_SECONDS = 15.0
_DATAGRAM = 2048
_SO_BINDTODEVICE = 25


@dataclass
class Namespace:
    """A namespace and the descriptors of its taps, in the order asked for."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    descriptors: list[int] = field(default_factory=list)

    @property
    def pid(self) -> int:
        """The process that holds it; :func:`inside` takes it."""
        return self.process.pid

    def close(self) -> None:
        """Let it go; descriptors handed over are their owners'."""
        self.control.close()
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def inside(pid: int, command: list[str]) -> list[str]:
    """*command* as it is run in the namespace that process *pid* holds."""
    own_user = Path(f"/proc/{pid}/ns/user").samefile("/proc/self/ns/user")
    return [
        *("nsenter", "--preserve-credentials", *(() if own_user else ("--user",)), "--net"),
        *("--target", str(pid), "--", *command),
    ]


@cache
def _leaving() -> tuple[str, ...]:
    """Options of ``unshare``: a user namespace gives the right to the other, which root has."""
    if os.geteuid() == 0:
        tried = subprocess.run(["unshare", "--user", "true"], capture_output=True, check=False)
        if tried.returncode:
            return ("--net",)
    return ("--user", "--map-root-user", "--net")


def open_namespace(taps: list[tuple[str, str]], *, services: bool = False) -> Namespace:
    """A namespace with *taps*: name and address with prefix length, which may be empty.

    With *services*, DHCP and DNS are answered at each tap's IPv4 address.
    :class:`HvHostError` where the kernel does not let users make namespaces.
    """
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        raise HvHostError(
            "a host-only network needs the programs unshare and ip; install the packages "
            "util-linux and iproute2."
        )
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        arguments = [f"{name}={address}" for name, address in taps]
        process = subprocess.Popen(
            [
                *("unshare", *_leaving(), sys.executable),
                *("-m", "hvhost.network.namespace", str(theirs.fileno())),
                *(("--services",) if services else ()),
                *arguments,
            ],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
    ours.settimeout(_READY_SECONDS)
    namespace = Namespace(process, ours)
    try:
        message, namespace.descriptors, _, _ = socket.recv_fds(ours, 16, len(taps))
    except TimeoutError:
        message = b""
    if message != b"ready":
        process.kill()
        _, errors = process.communicate()
        ours.close()
        said = errors.decode("utf-8", "replace").strip().splitlines()
        raise HvHostError(
            f"no network namespace could be made ({said[-1] if said else 'no answer'}); see that "
            "users may make namespaces (sysctl user.max_net_namespaces) and open /dev/net/tun."
        )
    return namespace


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HvHostError(f"{' '.join(command)}: {done.stderr.strip()}")


def _serve(control: socket.socket, taps: list[str], *, services: bool) -> None:
    from hvhost.network.wires import open_tap

    _run("ip", "link", "set", "lo", "up")
    descriptors, served = [], []
    for each in taps:
        name, _, addresses = each.partition("=")
        descriptors.append(open_tap(name, make=True))
        for address in filter(None, addresses.split("+")):
            _run("ip", "address", "add", address, "dev", name, *_NODAD[":" in address])
        _run("ip", "link", "set", name, "up")
        four = [address for address in addresses.split("+") if address and ":" not in address]
        served += [(name, address) for address in four[:1]]
    servers = [_Server(*each) for each in served] if services else []
    socket.send_fds(control, [b"ready"], descriptors)
    sources: dict[socket.socket, Callable[[], None]] = {}
    for server in servers:
        sources |= {server.dhcp: server.lease, server.dns: server.resolve}
    while True:
        readable, _, _ = select.select([control, *sources], [], [])
        if control in readable:
            return
        for source in readable:
            with contextlib.suppress(OSError):  # such as an address that nobody has any more
                sources[source]()


class _Server:
    """DHCP and DNS at one tap, for guests whose network leads nowhere else."""

    def __init__(self, interface: str, address: str) -> None:
        from hvhost.network.leases import Leases

        own = ipaddress.IPv4Interface(address)
        self._leases = Leases(own)
        self.dhcp = _udp(interface, "", 67)
        self.dhcp.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        self.dns = _udp(interface, str(own.ip), 53)

    def lease(self) -> None:
        reply = self._leases.answer(self.dhcp.recv(_DATAGRAM))
        if reply is not None:
            self.dhcp.sendto(reply.data, (reply.to, 68))

    def resolve(self) -> None:
        from hvhost.network.leases import resolve

        query, sender = self.dns.recvfrom(_DATAGRAM)
        answer = resolve(query, self._leases.names)
        if answer is not None:
            self.dns.sendto(answer, sender)


def _udp(interface: str, address: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, _SO_BINDTODEVICE, interface.encode())
    sock.bind((address, port))
    sock.setblocking(False)
    return sock


_NODAD: dict[bool, tuple[str, ...]] = {False: (), True: ("nodad",)}


def main() -> int:
    """The process that holds a namespace: its arguments are of :func:`open_namespace`."""
    with socket.socket(fileno=int(sys.argv[1])) as control:
        try:
            services = sys.argv[2:3] == ["--services"]
            _serve(control, sys.argv[3:] if services else sys.argv[2:], services=services)
        except HvHostError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
