"""A network namespace of one's own with a tap device in it; needs no rights.

Started as ``unshare --user --map-root-user --net python -m hvhost.network.namespace SOCKET_FD …``:
makes the devices, hands their descriptors over the socket, and holds the namespace until the socket
is closed. The kernel in there is the other end of each tap.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, field

from hvhost.errors import HvHostError

_READY_SECONDS = 15.0


@dataclass
class Namespace:
    """A namespace and the descriptors of its taps, in the order asked for."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    descriptors: list[int] = field(default_factory=list)

    @property
    def pid(self) -> int:
        """The process that holds it; ``nsenter --target`` takes it."""
        return self.process.pid

    def enter(self, command: list[str]) -> list[str]:
        """*command* as it is run inside."""
        return [
            *("nsenter", "--preserve-credentials", "--user", "--net"),
            *("--target", str(self.pid), "--", *command),
        ]

    def close(self) -> None:
        """Let it go; descriptors handed over are their owners'."""
        self.control.close()
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def open_namespace(taps: list[tuple[str, str]]) -> Namespace:
    """A namespace with *taps*: name and address with prefix length, which may be empty.

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
                *("unshare", "--user", "--map-root-user", "--net", sys.executable),
                *("-m", "hvhost.network.namespace", str(theirs.fileno()), *arguments),
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


def _serve(control: socket.socket, taps: list[str]) -> None:
    from hvhost.network.wires import open_tap

    _run("ip", "link", "set", "lo", "up")
    descriptors = []
    for each in taps:
        name, _, addresses = each.partition("=")
        descriptors.append(open_tap(name))
        for address in filter(None, addresses.split("+")):
            _run("ip", "address", "add", address, "dev", name, *_NODAD[":" in address])
        _run("ip", "link", "set", name, "up")
    socket.send_fds(control, [b"ready"], descriptors)
    control.recv(1)


_NODAD: dict[bool, tuple[str, ...]] = {False: (), True: ("nodad",)}


def main() -> int:
    with socket.socket(fileno=int(sys.argv[1])) as control:
        try:
            _serve(control, sys.argv[2:])
        except HvHostError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
