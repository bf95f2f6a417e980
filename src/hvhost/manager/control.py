"""What people do with running machines by name, and the waiting that belongs to it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from hvhost.errors import HvHostError
from hvhost.machine.model import MachineInfo, ShutdownAction
from hvhost.manager.client import MachineClient
from hvhost.manager.directory import MachineDirectory, NameState, machine_directories

_FORCE_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Listing:
    """One line of ``hvhost ps``: ``info`` is ``None`` where no worker answers."""

    name: str
    state: str
    pid: int | None
    info: MachineInfo | None


def machines() -> list[Listing]:
    """All machines of this user that run, start, or have died without cleaning up; by name."""
    listings = []
    for directory in machine_directories():
        state = directory.state()
        if state is NameState.FREE:
            continue
        info = None
        if state is NameState.ALIVE:
            try:
                info = MachineClient(directory.name).info()
            except HvHostError:
                if directory.state() is NameState.FREE:  # it stopped while being asked
                    continue
        listings.append(
            Listing(
                directory.name,
                "no-answer"
                if state is NameState.ALIVE and info is None
                else str(info.state if info else state),
                directory.worker_pid(),
                info,
            )
        )
    return listings


def stop(name: str, *, force: bool = False, timeout: float = 60.0) -> None:
    """Power machine *name* off; returns when its worker is gone.

    Without *force* the guest is asked through its shutdown service and given *timeout* seconds.
    """
    client = MachineClient(name)
    if force:
        client.force_stop()
        if not client.directory.wait_gone(_FORCE_SECONDS):
            raise HvHostError(
                f"the worker of machine {name!r} does not end; kill process"
                f" {client.directory.worker_pid()}."
            )
        return
    _check_shutdown_service(client.info(), "stop")
    client.shut_down(ShutdownAction.POWER_OFF)
    if not client.directory.wait_gone(timeout):
        raise HvHostError(
            f"the guest of machine {name!r} was asked to shut down but is still running after"
            f" {timeout:g} seconds; give it a longer --timeout, or power it off with"
            f" `hvhost stop --force {name}`."
        )


def restart(name: str, *, force: bool = False, timeout: float = 60.0) -> None:
    """Boot machine *name* again; returns when its kernel has been entered anew.

    Without *force* the guest reboots itself, asked through its shutdown service.
    """
    client = MachineClient(name)
    before = client.info()
    if force:
        client.reset()
    else:
        _check_shutdown_service(before, "restart")
        client.shut_down(ShutdownAction.REBOOT)
    deadline = time.monotonic() + timeout
    seen = 0
    while client.info().boots <= before.boots:
        left = deadline - time.monotonic()
        if left <= 0:
            raise HvHostError(
                f"machine {name!r} did not boot again within {timeout:g} seconds; give it a longer"
                f" --timeout, or reset it with `hvhost restart --force {name}`."
            )
        for event in client.events(seen, min(left, 1.0)):
            seen = event.sequence


def remove(name: str) -> None:
    """Delete what machine *name* has left: its log. :class:`HvHostError` while it runs."""
    directory = MachineDirectory.of(name)
    if not directory.remove():
        if directory.state() in (NameState.ALIVE, NameState.STARTING):
            raise HvHostError(
                f"machine {name!r} is running; stop it with `hvhost stop {name}` first."
            )
        raise HvHostError(f"nothing is left of a machine {name!r}; check the name.")


def remove_stopped() -> list[str]:
    """Delete what machines have left that no longer run; their names."""
    return [directory.name for directory in machine_directories() if directory.remove()]


def _check_shutdown_service(info: MachineInfo, verb: str) -> None:
    if not info.shutdown_ready:
        raise HvHostError(
            f"the guest of machine {info.name!r} has no shutdown service (its hv_utils driver is"
            f" not there, or not yet); use `hvhost {verb} --force {info.name}`."
        )
