"""``nmi``: a guest that hangs with interrupts off still takes a non-maskable interrupt.

Linux sends the last 4 KiB of its log, not the first ([linux] drivers/hv/hv_common.c,
``hv_kmsg_dump``), and does so before its line ``end Kernel panic``; so the trace of a busy
processor may push out the line that says what the panic is. Then the trace itself tells, as long
as its upper end is there; where that is gone too, the guest is hung once more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from hvhost.verify.guest import RowFailed
from hvhost.verify.session import Session

INTERRUPT_FLAG = 1 << 9
ATTEMPTS = 3
_ANY_PANIC = re.compile(r"Kernel panic - not syncing: .*")
_INTERRUPTED = re.compile(r"RIP: [0-9a-f]{4}:(?P<rip>\S+).*?EFLAGS: (?P<flags>[0-9a-f]{8})", re.S)
# "nmi_panic.cold+0xc/0xc"; lines with a question mark before it are guesses of the unwinder.
_FRAME = re.compile(
    r"^(?:<\d+>)?[ ]*(?:\[[^\]\n]*\][ ]*)*(?P<name>\w+)(?:\.\w+)*\+0x[0-9a-f]+/0x[0-9a-f]+", re.M
)
#: What takes an NMI that nobody claims; a compiler makes one, two or three functions of it. A
#: watchdog's panic has its own handler between these and nmi_panic.
_TAKES_NMI = frozenset({"unknown_nmi_error", "default_do_nmi", "exc_nmi", "do_nmi"})
#: Records are sent whole, so a full text may be this much shorter than 4 KiB.
_FULL_TEXT = 3 << 10


def interrupted_at(text: str) -> tuple[str, int] | None:
    """Where the panic text says the NMI struck, and RFLAGS there; ``None`` if it does not say."""
    match = _INTERRUPTED.search(text)
    return (match["rip"], int(match["flags"], 16)) if match else None


def nmi_panic(text: str) -> str | None:
    """What in a guest's panic *text* says that it panicked because of an NMI; ``None`` if nothing.

    Its panic line where the text has one, else who called ``nmi_panic`` by its trace.
    """
    if panics := _ANY_PANIC.findall(text):
        return panics[-1].strip() if re.search(r"\bNMI\b", panics[-1]) else None
    frames = _FRAME.findall(text)
    for callee, caller in pairwise(frames):
        if callee == "nmi_panic" and caller in _TAKES_NMI:
            return (
                f"the last {len(text)} characters of its log, a trace in which {caller} calls "
                "nmi_panic"
            )
    return None


def is_cut(text: str) -> bool:
    """Whether a panic *text* begins behind the panic's own line, for the trace was so long."""
    return len(text) >= _FULL_TEXT and _ANY_PANIC.search(text) is None


def _send(session: Session) -> str:
    """Hang the guest and send it an NMI; the panic text that it sends then."""
    session.hung()
    session.step("sending an NMI to the hung guest")
    mark = session.event_mark()
    session.machine.nmi()
    event = session.await_event("crash", mark, suits=lambda event: bool(event.detail))
    session.spoil()
    if event is None:
        raise RowFailed("the hung guest sent no panic text after the NMI")
    return event.detail


def prove(session: Session) -> Iterator[str]:
    """The guest hangs, takes the NMI, panics on it, and sends the panic to the host."""
    for attempt in range(1, ATTEMPTS + 1):
        text = _send(session)
        told = nmi_panic(text)
        if told is not None:
            break
        lines = [f"text: {line}" for line in text.splitlines()[-8:]]
        if not is_cut(text):
            raise RowFailed("the guest panicked after the NMI, but not because of it", lines)
        if attempt == ATTEMPTS:
            raise RowFailed(
                f"the guest panicked after the NMI {ATTEMPTS} times, but sent only the end of a "
                "long trace, which does not say why; --keep-logs has its console",
                lines,
            )
        session.step("the panic's first line did not fit into what the guest sends; once more")
    where = interrupted_at(text)
    if where is not None:
        rip, flags = where
        if flags & INTERRUPT_FLAG:
            raise RowFailed(f"the guest was not hung with interrupts off: RFLAGS {flags:#x}")
        yield f"the guest says the NMI struck at {rip} with RFLAGS {flags:#x}: interrupts were off"
    yield f"hung with interrupts off; after the NMI the guest sent: {told}"
