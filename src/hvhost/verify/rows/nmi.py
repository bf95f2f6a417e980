"""``nmi``: a guest that hangs with interrupts off still takes a non-maskable interrupt."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hvhost.verify.guest import RowFailed
from hvhost.verify.session import Session

INTERRUPT_FLAG = 1 << 9
_PANIC = re.compile(r"Kernel panic - not syncing: .*\bNMI\b.*")
_INTERRUPTED = re.compile(r"RIP: [0-9a-f]{4}:(?P<rip>\S+).*?EFLAGS: (?P<flags>[0-9a-f]{8})", re.S)


def interrupted_at(text: str) -> tuple[str, int] | None:
    """Where the panic text says the NMI struck, and RFLAGS there; ``None`` if it does not say."""
    match = _INTERRUPTED.search(text)
    return (match["rip"], int(match["flags"], 16)) if match else None


def prove(session: Session) -> Iterator[str]:
    """The guest hangs, takes the NMI, panics on it, and sends the panic to the host."""
    session.hung()
    session.step("sending an NMI to the hung guest")
    mark = session.event_mark()
    session.machine.nmi()
    event = session.await_event("crash", mark, suits=lambda event: bool(event.detail))
    session.spoil()
    if event is None:
        raise RowFailed("the hung guest sent no panic text after the NMI")
    panic = _PANIC.search(event.detail)
    if panic is None:
        raise RowFailed(
            "the guest panicked after the NMI, but not because of it",
            [f"text: {line}" for line in event.detail.splitlines()[-8:]],
        )
    where = interrupted_at(event.detail)
    if where is not None:
        rip, flags = where
        if flags & INTERRUPT_FLAG:
            raise RowFailed(f"the guest was not hung with interrupts off: RFLAGS {flags:#x}")
        yield f"the guest says the NMI struck at {rip} with RFLAGS {flags:#x}: interrupts were off"
    yield f"hung with interrupts off; after the NMI the guest sent: {panic[0].strip()}"
