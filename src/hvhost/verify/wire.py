"""A guest's cable under test: an adapter in the guest, a namespace's kernel at the other end."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from hvhost.errors import HvHostError
from hvhost.network.config import new_mac
from hvhost.network.namespace import inside
from hvhost.network.report import AdapterInfo
from hvhost.verify.guest import HostLacks, Probe, RowFailed
from hvhost.verify.script import run
from hvhost.verify.session import Session

HOST4, GUEST4 = "192.168.77.1", "192.168.77.2"
HOST6, GUEST6 = "fd77::1", "fd77::2"
HOST_ADDRESSES = f"{HOST4}/24+{HOST6}/64"
#: The driver of a new adapter is given so many times what a single event is.
_DRIVER_EVENTS = 4


class Witness:
    """A namespace's own kernel, asked by programs that run inside it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def command(self, *words: str) -> str:
        """A program's output; :class:`RowFailed` if it fails."""
        done = subprocess.run(
            inside(self.pid, list(words)), capture_output=True, text=True, timeout=30, check=False
        )
        if done.returncode:
            raise RowFailed(f"on the host, {' '.join(words)!r} failed: {done.stderr.strip()}")
        return done.stdout

    def set_kernel(self, path: str, value: str) -> None:
        """Write a setting of that kernel, below ``/proc/sys/net``; :class:`HostLacks` if none may.

        A container's ``/proc/sys`` is read-only, whatever its root may do; one mounted anew is not.
        """
        write = f"echo {value} > {path}"
        try:
            self.command("sh", "-c", write)
            return
        except RowFailed as error:
            reason = str(error)
        anew = ("unshare", "--mount", "sh", "-c", f"mount -t proc proc /proc && {write}")
        done = subprocess.run(
            ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--", *anew],
            capture_output=True,
            check=False,
        )
        if done.returncode:
            raise HostLacks(
                f"{reason}; give a container the option --security-opt systempaths=unconfined"
            )

    def do(self, action: str, **how: object) -> dict[str, Any]:
        """An action of :mod:`hvhost.verify.witness`, to its end."""
        return Action(self, action, how).result()

    def begin(self, action: str, **how: object) -> Action:
        """As :meth:`do`, for one that waits for the guest; returns once it is ready to."""
        begun = Action(self, action, how)
        begun.await_ready()
        return begun

    def counter(self, name: str, interface: str = "tap0") -> int:
        """A number of ``/sys/class/net``, by way of a mount of the namespace's own sysfs."""
        text = self.command("ip", "-s", "-json", "link", "show", interface)
        statistics = json.loads(text)[0]["stats64"]
        way, _, what = name.partition("_")
        return int(statistics[way][what])

    def snmp(self, protocol: str, name: str) -> int:
        """A counter of ``/proc/net/snmp``."""
        return snmp(self.command("cat", "/proc/net/snmp"), protocol, name)


class Action:
    """A witness at work."""

    def __init__(self, witness: Witness, action: str, how: dict[str, object]) -> None:
        words = [sys.executable, "-m", "hvhost.verify.witness", action, json.dumps(how)]
        self.name = action
        self._process = subprocess.Popen(
            inside(witness.pid, words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def await_ready(self) -> None:
        """Until it says so."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if line != "ready":
            self._process.kill()
            _, errors = self._process.communicate()
            raise RowFailed(f"the host's {self.name} did not start: {line or errors.strip()}")

    def result(self, timeout: float = 90.0) -> dict[str, Any]:
        """What it saw, once it is done; its input is closed, which ends ``watch``."""
        try:
            output, errors = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RowFailed(f"the host's {self.name} did not end within {timeout:g} s") from None
        try:
            result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
        except (ValueError, IndexError):
            said = errors.strip().splitlines()
            raise RowFailed(f"the host's {self.name} broke: {said[-1] if said else ''}") from None
        if "error" in result:
            raise RowFailed(f"the host's {self.name}: {result['error']}")
        return result

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.communicate()


def snmp(text: str, protocol: str, name: str) -> int:
    """The value of *name* in the two lines of *protocol*."""
    names, values = (line.split() for line in text.splitlines() if line.startswith(f"{protocol}:"))
    return int(values[names.index(name)])


class Cable:
    """One adapter, in the guest *interface*, and the witness at its other end."""

    def __init__(self, session: Session, probe: Probe, info: AdapterInfo) -> None:
        self.session, self.probe, self.info = session, probe, info
        self.witness = Witness(info.namespace_pid)
        self.interface = find_interface(session, probe, info.mac)

    def guest(self, script: str, timeout: float = 60.0) -> str:
        """A shell script's output in the guest, ``$I`` the interface; RowFailed if it fails."""
        return run(
            self.probe, f"I={self.interface}; {script}", self.session.timing.patiently(timeout)
        )

    def configure(self) -> None:
        """Addresses of both families, and the link up."""
        self.guest(
            f"ip link set $I up; ip addr add {GUEST4}/24 dev $I; "
            f"echo 0 > /proc/sys/net/ipv6/conf/$I/accept_dad; ip addr add {GUEST6}/64 dev $I"
        )
        self.await_ping()

    def await_ping(self) -> None:
        """Until the guest answers."""
        deadline = time.monotonic() + self.session.timing.event
        while not self.witness.do("ping", to=GUEST4, timeout=1.0)["answers"]:
            if time.monotonic() > deadline:
                raise RowFailed(
                    "the guest does not answer on its new adapter",
                    self.guest("ip addr show $I; dmesg | tail -5").splitlines(),
                )

    def transfer_out(self, size: int, *, ipv6: bool = False) -> dict[str, Any]:
        """*size* random bytes from the guest to the host; RowFailed if their hash differs."""
        address = HOST6 if ipv6 else HOST4
        action = self.witness.begin("sink", address=address, port=5001)
        told = self.guest(
            f"head -c {size} /dev/urandom > /tmp/out; sha256sum /tmp/out | cut -c1-64; "
            # cat hands the kernel whole files, nc itself a KiB at a time: that would be the limit.
            f"nc {address} 5001 -e cat /tmp/out; rm /tmp/out",
            90.0,
        ).split()
        seen = action.result()
        if seen["size"] != size or seen["sha256"] != told[0]:
            raise RowFailed(f"of {size} bytes the guest sent, the host got {seen['size']}")
        return seen

    def transfer_in(self, size: int, *, ipv6: bool = False) -> dict[str, Any]:
        """*size* bytes from the host to the guest; RowFailed if their hash differs."""
        self.guest(
            "rm -f /tmp/in /tmp/done; "
            "(nc -l -p 5002 < /dev/null > /tmp/in; touch /tmp/done) > /dev/null 2>&1 &"
        )
        sent = self.witness.do("source", to=GUEST6 if ipv6 else GUEST4, port=5002, size=size)
        got = self.guest(
            "for i in $(seq 100); do [ -e /tmp/done ] && break; usleep 50000; done; "
            "sha256sum /tmp/in | cut -c1-64; rm -f /tmp/in /tmp/done"
        )
        if got != sent["sha256"]:
            raise RowFailed(f"of {size} bytes the host sent, the guest got something else")
        return sent

    def ethtool(self, option: str, *more: str) -> str:
        """``ethtool`` in the guest."""
        return self.guest(f"ethtool {option} $I {' '.join(more)}")

    def queue_counters(self, what: str = "rx") -> list[int]:
        """Packets of each queue, as the guest's driver counts them."""
        found = {}
        for line in self.ethtool("-S").splitlines():
            name, _, value = line.strip().partition(": ")
            if name.startswith(f"{what}_queue_") and name.endswith("_packets"):
                found[int(name.split("_")[2])] = int(value)
        return [found[number] for number in sorted(found)]


def find_interface(session: Session, probe: Probe, mac: str) -> str:
    """The guest's name for the adapter with address *mac*, once it has one."""
    deadline = time.monotonic() + _DRIVER_EVENTS * session.timing.event
    while True:
        found = interface_of(probe, mac)
        if found is not None:
            return found
        if time.monotonic() > deadline:
            raise RowFailed(
                f"no network interface with the address {mac} appeared in the guest",
                run(probe, "dmesg | tail -8").splitlines(),
            )
        time.sleep(session.timing.poll)


def interface_of(probe: Probe, mac: str) -> str | None:
    """The guest's interface with address *mac*, if there is one; VLAN interfaces do not count."""
    addresses = probe.read_all("/sys/class/net/*/address")
    for path, text in sorted(addresses.items()):
        name = path.split("/")[-2]
        if text.strip() == mac and "." not in name:
            return name
    return None


@contextlib.contextmanager
def cable(
    session: Session, options: Sequence[str] = (), *, configure: bool = True
) -> Iterator[Cable]:
    """A new adapter on a host-only network, taken away again at the end."""
    probe = session.running()
    network = session.machine.network
    session.step("plugging in a network adapter")
    nic = ",".join(
        ["host-only", "dhcp=off", f"address={HOST_ADDRESSES}", f"mac={new_mac()}", *options]
    )
    try:
        info = network.add(nic, "verify0")
    except HvHostError as error:
        if "namespace" in str(error) or "/dev/net/tun" in str(error):
            raise HostLacks(str(error)) from error
        raise
    try:
        made = Cable(session, probe, info)
        if configure:
            made.configure()
        yield made
    finally:
        with contextlib.suppress(HvHostError):  # gone already, with its machine or without
            network.remove("verify0")
