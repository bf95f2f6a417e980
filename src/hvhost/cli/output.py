"""How results look: tables for people, JSON for programs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hvhost.machine.model import CopyProgress, MachineInfo, ServiceInfo
from hvhost.manager.control import Listing
from hvhost.manager.doctor import Diagnosis
from hvhost.units import format_size

if TYPE_CHECKING:
    from hvhost.storage.operations import DiskInfo

_PIPE_WIDTH = 200

_STYLES = {
    "running": "green",
    "on": "green",
    "off": "yellow",
    "ok": "green",
    "starting": "yellow",
    "paused": "yellow",
    "warning": "yellow",
    "crashed": "red",
    "failed": "red",
    "missing": "red",
    "dead": "red",
    "no-answer": "red",
    "no-contact": "red",
}


def _console() -> Console:
    """A console that does not fold lines for a program that reads them."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)


def state(word: str) -> Text:
    """A state's word in its colour."""
    return Text(word, _STYLES.get(word, ""))


def plain(text: str) -> Text:
    """Text of a guest, whose markup is not ours, without what would move the cursor."""
    return Text("".join(each if each.isprintable() else "\ufffd" for each in text))


def print_json(value: object) -> None:
    """Any dataclass, or list of them, as indented JSON."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_json_line(value: object) -> None:
    """As :func:`print_json`, on one line that is not kept back: for what goes on."""
    print(msgspec.json.encode(value).decode(), flush=True)


def table(*columns: str) -> Table:
    """A plain table."""
    return Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)


def print_renderable(*things: object) -> None:
    """Print rich renderables to standard output."""
    console = _console()
    for thing in things:
        console.print(thing)


def print_machines(listings: Iterable[Listing]) -> None:
    """The table of ``hvhost ps``."""
    rows = table("NAME", "STATE", "PID", "CPUS", "MEMORY", "UP", "HEARTBEAT", "KVM", "KERNEL")
    for each in listings:
        pid = "" if each.pid is None else str(each.pid)
        if each.info is None:
            rows.add_row(Text(each.name), state(each.state), pid)
            continue
        rows.add_row(
            Text(each.name),
            state(each.state),
            pid,
            str(each.info.cpus),
            format_size(each.info.memory),
            _duration(each.info.seconds),
            state(each.info.heartbeat),
            each.info.transport,
            Text(each.info.kernel),
        )
    print_renderable(rows)


def print_info(info: MachineInfo) -> None:
    """The page of ``hvhost info``."""
    grid = Table.grid(padding=(0, 2))
    round_trip = info.heartbeat_round_trip_microseconds
    heartbeat = state(info.heartbeat)
    if round_trip is not None:
        heartbeat += Text(f" ({round_trip:.0f} µs)")
    rows: list[tuple[str, str | Text]] = [
        ("name", Text(info.name, "bold")),
        ("state", state(info.state)),
        ("up", _duration(info.seconds)),
        ("boots", str(info.boots)),
        ("worker", f"process {info.pid}"),
        ("cpus", str(info.cpus)),
        ("memory", format_size(info.memory)),
        ("kvm", info.transport),
        ("kernel", Text(info.kernel)),
        ("command line", Text(info.command_line)),
        ("guest OS id", f"{info.guest_os_id:#018x}" if info.guest_os_id else "not announced"),
        ("bus", f"VMBus {info.vmbus_version}" if info.vmbus_version else "not connected"),
        ("heartbeat", heartbeat),
        ("shutdown service", "ready" if info.shutdown_ready else "not there"),
        ("time service", "ready" if info.timesync_ready else "not there"),
        ("key-value service", "ready" if info.kvp_ready else "not there"),
    ]
    if info.crash is not None:
        parameters = " ".join(f"{value:#x}" for value in info.crash.parameters)
        rows.append(("crash", Text(f"after {_duration(info.crash.seconds)}: {parameters}")))
        if info.crash.text:
            rows.append(("crash text", Text(info.crash.text)))
    if info.last_stop is not None:
        rows.append(("last stop", Text(info.last_stop)))
    if info.error is not None:
        rows.append(("error", Text(info.error, "red")))
    if info.exits:
        most = sorted(info.exits.items(), key=lambda item: -item[1])
        rows.append(("exits", ", ".join(f"{reason} {count:,}" for reason, count in most)))
    for label, value in rows:
        grid.add_row(Text(label, "dim"), value)
    things: list[object] = [grid]
    if info.channels:
        channels = table("CHANNEL", "NAME", "STATE", "VP", "INTERFACE", "INSTANCE")
        for channel in info.channels:
            channels.add_row(
                str(channel.channel_id),
                Text(channel.name),
                state(channel.state),
                str(channel.target_vp),
                channel.interface_type,
                channel.interface_instance,
            )
        things.append(channels)
    print_renderable(*things)


def _duration(seconds: float) -> str:
    """``4.2 s``, ``3 min 5 s``, ``2 h 10 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """The table of ``hvhost doctor``, and under it what to do."""
    rows = table("CHECK", "STATUS", "FINDING")
    for check in diagnosis.checks:
        rows.add_row(check.id, state(check.status), Text(check.finding))
    things: list[object] = [rows]
    fixes = [check for check in diagnosis.checks if check.fix and check.status != "ok"]
    things += [Text.assemble((f"{check.id}: ", "dim"), check.fix or "") for check in fixes]
    match diagnosis.transport:
        case "local":
            summary = "Virtual processors run on this computer's own KVM."
        case "rig":
            summary = "Virtual processors run in the rig, a KVM host in software."
        case _:
            summary = "Nothing here can run virtual processors yet."
    things.append(Text(f"{'' if not fixes else chr(10)}{summary}", "bold"))
    print_renderable(*things)


def print_fields(value: object) -> None:
    """A dataclass, one line per field."""
    grid = Table.grid(padding=(0, 2))
    for label, field in msgspec.to_builtins(value).items():
        grid.add_row(Text(label.replace("_", " "), "dim"), Text(str(field)))
    print_renderable(grid)


@contextmanager
def byte_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, where that is a terminal, fed with bytes done and bytes in all."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(Text(label).plain, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def copy_progress(label: str) -> Iterator[Callable[[CopyProgress], None]]:
    """The same for the progress of a copy."""
    with byte_progress(label) as update:
        yield lambda progress: update(progress.copied, progress.size)


def print_copied(progress: CopyProgress) -> None:
    """The line under a finished ``hvhost copy``."""
    rate = format_size(round(progress.size / progress.seconds)) if progress.seconds else "many"
    print(
        f"Copied {format_size(progress.size)} to {progress.destination}"
        f" in {_duration(progress.seconds)} ({rate}/s)."
    )


def print_disk(info: DiskInfo) -> None:
    """The page of ``hvhost disk info``."""
    grid = Table.grid(padding=(0, 2))
    user = info.in_use_by
    rows = [
        ("file", info.file),
        ("format", info.format if info.type == info.format else f"{info.format}, {info.type}"),
        ("size", f"{format_size(info.size)} ({info.size} bytes)"),
        ("allocated", format_size(info.allocated)),
        ("block size", "" if info.block_size is None else format_size(info.block_size)),
        ("sectors", f"{info.logical_sector_size} bytes, physical {info.physical_sector_size}"),
        ("identifier", info.identifier),
        ("parent", info.parent or ""),
        ("in use by", "" if user is None else f"process {user}"),
    ]
    for label, value in rows:
        if value:
            grid.add_row(Text(label, "dim"), plain(value))
    print_renderable(grid)


def print_services(services: Iterable[ServiceInfo]) -> None:
    """The table of ``hvhost services``."""
    rows = table("SERVICE", "SWITCHED", "CHANNEL", "GUEST")
    for each in services:
        rows.add_row(
            each.name,
            state("on" if each.enabled else "off"),
            Text(each.state or ""),
            "ready" if each.ready else "",
        )
    print_renderable(rows)
