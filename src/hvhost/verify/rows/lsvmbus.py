"""``lsvmbus``: the guest lists its bus, and the host lists the same."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Iterator

from hvhost.verify.guest import Probe, RowFailed
from hvhost.verify.session import Session
from hvhost.verify.sysfs import interface_name, read_devices

_ENTRY = re.compile(r"Class_ID = \{([0-9a-f-]{36})\}.*\n\s*Device_ID = \{([0-9a-f-]{36})\}", re.I)
# No longer on the bus, although the host may still remember them.
_GONE = frozenset({"rescinded", "released"})

Identity = tuple[str, str]


def parse_lsvmbus(output: str) -> tuple[Identity, ...]:
    """Interface type and instance of every device that ``lsvmbus -vv`` printed."""
    return tuple((match[1].lower(), match[2].lower()) for match in _ENTRY.finditer(output))


def _list_in_guest(probe: Probe) -> tuple[tuple[Identity, ...], str]:
    script = 'command -v python3 >/dev/null && s=$(command -v lsvmbus) && exec python3 "$s" -vv'
    by_script = probe.run(["sh", "-c", script], 60.0)  # Python starts slowly where it is emulated
    if by_script.status == 0 and (devices := parse_lsvmbus(by_script.output)):
        return devices, "the kernel source's lsvmbus -vv"
    devices = tuple(
        (device.interface_type, device.interface_instance) for device in read_devices(probe)
    )
    return devices, "our probe in /sys/bus/vmbus/devices (no lsvmbus there)"


def _names(identities: Iterable[Identity]) -> str:
    return ", ".join(
        f"{interface_name(interface)} {{{instance}}}" for interface, instance in sorted(identities)
    )


def _nameless(identity: Identity) -> bool:
    try:
        return any(uuid.UUID(guid).int == 0 for guid in identity)
    except ValueError:
        return True


def prove(session: Session) -> Iterator[str]:
    """The guest's list and the host's hold the same devices, each named."""
    probe = session.running()
    session.step("listing the bus in the guest")
    listed, source = _list_in_guest(probe)
    if not listed:
        raise RowFailed("the guest lists no device on its bus", [f"read by {source}"])
    if broken := [identity for identity in listed if _nameless(identity)]:
        raise RowFailed(f"the guest lists devices without a name: {_names(broken)}")
    in_guest = set(listed)
    if len(in_guest) != len(listed):
        twice = {identity for identity in in_guest if listed.count(identity) > 1}
        raise RowFailed(f"the guest lists a device twice: {_names(twice)}")
    by_host = {
        (channel.interface_type.lower(), channel.interface_instance.lower())
        for channel in session.machine.info().channels
        if channel.state not in _GONE
    }
    if missing := by_host - in_guest:
        raise RowFailed(
            f"the host offers what the guest does not list: {_names(missing)}",
            [f"the guest lists {_names(in_guest)}", f"read by {source}"],
        )
    if surplus := in_guest - by_host:
        raise RowFailed(f"the guest lists what the host does not: {_names(surplus)}")
    yield from (_names([identity]) for identity in sorted(in_guest))
    yield f"{len(in_guest)} devices, the same in the guest and on the host; listed by {source}"
