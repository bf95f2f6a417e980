"""``kvp``: key-value pairs both ways, in every pool, as the guest's own files show them.

The daemon of the distribution keeps each pool in a file of fixed records: 512 bytes of key, 2,048
of value. What the host set is read there; what the host is to read is written there.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable, Iterator

from hvhost.errors import HvHostError
from hvhost.machine.model import IpSettings, KvpPool
from hvhost.verify.contract import HV_KVP_GUID
from hvhost.verify.guest import Probe, RowFailed
from hvhost.verify.session import Session
from hvhost.verify.sysfs import GuestDevice, read_devices

FILES = "/var/lib/hyperv/.kvp_pool_"
KEY_SIZE, VALUE_SIZE = 512, 2048
LONGEST_KEY, LONGEST_VALUE = 254, 1022
HOST_RECORDS = 11
"""Records in pool 3 that test suites of Microsoft's expect at least."""
DRIVER = "/sys/bus/vmbus/drivers/hv_utils"
UNICODE = "schlüssel-鍵", "wert-値-🗝"
NOBODY = "{00000000-0000-4000-8000-000000000000}"


def parse_pool(data: bytes) -> dict[str, str]:
    """The whole records of a pool's file; what follows a text's zero is anything."""
    size = KEY_SIZE + VALUE_SIZE
    records = (data[start : start + size] for start in range(0, len(data) - size + 1, size))
    return {_text(record[:KEY_SIZE]): _text(record[KEY_SIZE:]) for record in records}


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "replace")


def _pool(probe: Probe, pool: KvpPool) -> dict[str, str]:
    return parse_pool(probe.read_bytes(f"{FILES}{pool.number}"))


def _write(probe: Probe, pool: KvpPool, key: str, value: str) -> None:
    """Add a record to a pool's file, as a program of the guest would."""
    fields = "; ".join(
        f"printf %s {shlex.quote(text)} | dd bs={size} count=1 conv=sync 2>/dev/null"
        for text, size in ((key, KEY_SIZE), (value, VALUE_SIZE))
    )
    result = probe.run(["sh", "-c", f"{{ {fields}; }} >> {FILES}{pool.number}"], 20.0)
    if result.status != 0:
        raise RowFailed(f"the guest cannot write its pool {pool}: {result.output.strip()}")


def _device(probe: Probe) -> GuestDevice:
    for device in read_devices(probe):
        if device.interface_type == HV_KVP_GUID and device.driver:
            return device
    raise RowFailed("no driver of the guest bound to the key-value device")


def _await(session: Session, what: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + session.timing.event
    while not what():
        if time.monotonic() >= deadline:
            raise RowFailed(otherwise)
        time.sleep(session.timing.poll)


def _await_host_records(session: Session, probe: Probe) -> dict[str, str]:
    _await(
        session,
        lambda: session.machine.info().kvp_ready,
        "the guest's key-value driver did not answer: its daemon did not register",
    )
    records: dict[str, str] = {}

    def there() -> bool:
        nonlocal records
        records = _pool(probe, KvpPool.AUTO_EXTERNAL)
        return len(records) >= HOST_RECORDS and "VirtualMachineName" in records

    try:
        _await(session, there, "")
    except RowFailed:
        raise RowFailed(
            f"the guest's pool 3 came to {len(records)} records of {HOST_RECORDS}"
        ) from None
    return records


def _host_records(session: Session, probe: Probe) -> str:
    records = _await_host_records(session, probe)
    name = session.machine.info().name
    if records["VirtualMachineName"] != name:
        raise RowFailed(f"the guest was told the name {records['VirtualMachineName']}, not {name}")
    missing = {"HostName", "PhysicalHostName", "VirtualMachineId"} - records.keys()
    if missing:
        raise RowFailed(f"the guest was not told {', '.join(sorted(missing))}")
    return (
        f"pool 3 has {len(records)} records of the host: VirtualMachineName={name}, "
        f"PhysicalHostName={records['PhysicalHostName']}"
    )


def _to_guest(session: Session, probe: Probe) -> str:
    services = session.machine.services
    pools = [pool for pool in KvpPool if pool is not KvpPool.AUTO]
    longest = "k" * LONGEST_KEY, "v" * LONGEST_VALUE
    for pool in pools:
        for key, value in (UNICODE, longest, (UNICODE[0], "changed")):
            services.kvp_set(key, value, pool)
            if (seen := _pool(probe, pool).get(key)) != value:
                raise RowFailed(f"the host set {key[:20]} in pool {pool}, the guest has {seen!r}")
        if (read := services.kvp_get(longest[0], pool).value) != longest[1]:
            raise RowFailed(f"the longest item came back from pool {pool} as {read[:40]!r}")
        for key in (UNICODE[0], longest[0]):
            services.kvp_delete(key, pool)
        left = _pool(probe, pool).keys() & {UNICODE[0], longest[0]}
        if left:
            raise RowFailed(f"the host deleted items of pool {pool}, the guest still has {left}")
    return (
        f"host to guest: pools {', '.join(str(pool.number) for pool in pools)}: set, changed, "
        f"read back and deleted; unicode; key of {LONGEST_KEY} and value of {LONGEST_VALUE}"
    )


def _from_guest(session: Session, probe: Probe) -> str:
    _write(probe, KvpPool.GUEST, *UNICODE)
    record = session.machine.services.kvp_get(UNICODE[0])
    if (record.pool, record.value) != (KvpPool.GUEST, UNICODE[1]):
        raise RowFailed(f"the guest wrote {UNICODE}, the host read {record}")
    return f"guest to host: {record.key}={record.value} written in the guest, read by the host"


def _intrinsic(session: Session, probe: Probe) -> str:
    items = {each.key: each.value for each in session.machine.services.kvp_list(KvpPool.AUTO)}
    release = probe.read("/proc/sys/kernel/osrelease").strip()
    found = re.search(r'^NAME="?([^"\n]*)', probe.read("/etc/os-release"), re.M)
    wanted = {
        "OSBuildNumber": release,
        "OSVersion": release.split("-", 1)[0],
        "OSName": found[1] if found else "Linux",
        "ProcessorArchitecture": probe.run(["uname", "-m"], 10.0).output.strip(),
    }
    for key, value in wanted.items():
        if items.get(key) != value:
            raise RowFailed(f"the guest says {key} is {items.get(key)!r}, its system {value!r}")
    if "NetworkAddressIPv4" not in items:
        raise RowFailed("the guest does not tell its addresses")
    said = ", ".join(f"{key}={value}" for key, value in wanted.items())
    return f"intrinsic: {len(items)} items; {said}, as the guest's system says"


def _unknown_adapter(session: Session) -> str:
    try:
        session.machine.services.set_ip(IpSettings(NOBODY, family=1, addresses="192.0.2.1"))
    except HvHostError as error:
        if "no such network adapter" not in str(error):
            raise RowFailed(f"addresses for an unknown adapter: {error}") from error
        return "addresses for an unknown adapter: the daemon answers HV_GUID_NOTFOUND"
    raise RowFailed("the guest took addresses for an adapter that it does not have")


def _given_again(session: Session, probe: Probe, device: GuestDevice) -> str:
    services = session.machine.services
    services.kvp_set("hvhost-verify", "kept", KvpPool.EXTERNAL)
    session.step("letting the guest's driver and daemon come anew")
    try:
        probe.write(f"{DRIVER}/unbind", device.interface_instance)
        probe.run(["sh", "-c", f"rm -f {FILES}*"], 10.0)
        probe.write(f"{DRIVER}/bind", device.interface_instance)
    except HvHostError as error:
        raise RowFailed("the guest's driver could not be bound anew", [str(error)]) from error
    # Our initramfs starts the daemon of a device that appears.
    _await(
        session,
        lambda: (
            bool(probe.read_all(f"{FILES}0")) and "hvhost-verify" in _pool(probe, KvpPool.EXTERNAL)
        ),
        "a new daemon of the guest was not given the host's items again",
    )
    records = _await_host_records(session, probe)
    services.kvp_delete("hvhost-verify", KvpPool.EXTERNAL)
    return f"a new daemon with empty pools was given all again: {len(records)} records in pool 3"


def prove(session: Session) -> Iterator[str]:
    """Items of the host reach the guest's files, the guest's reach the host; limits; unicode."""
    probe = session.running()
    session.step("waiting for the guest's key-value daemon")
    device = _device(probe)
    yield _host_records(session, probe)
    session.step("exchanging key-value pairs")
    yield _to_guest(session, probe)
    yield _from_guest(session, probe)
    intrinsic = _intrinsic(session, probe)
    yield intrinsic
    yield _unknown_adapter(session)
    yield _given_again(session, probe, device)
    yield f"both ways, all pools, unicode, longest items; {intrinsic}"
