"""An emulator of the rig's own, without one fault that ends guests.

VMRUN with an interrupt to inject ([AMD64] volume 2, 15.20) makes QEMU 5.1 to 11.1 note the vector
as the processor's pending exception, deliver the interrupt at once, and leave the note where it is
(``helper_vmrun()`` in ``target/i386/tcg/system/svm_helper.c``). A processor that somebody asks to
stop before it takes another interrupt delivers what is noted: the same vector a second time, on
top of the first. Linux survives few of these; one came before the first instruction of the timer's
handler, where the stack and GS are still those of the interrupted program.

The delivery takes its vector from a register, so that the note has no use: without the one
instruction that writes it all is well. The emulator that the rig runs is a copy without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from pathlib import Path

from hvhost.paths import cache_dir, write_whole

log = logging.getLogger(__name__)

# What GCC makes of the case SVM_EVTINJ_TYPE_INTR: the vector, zero-extended, to exception_index
# (the second instruction of six bytes), exception_is_int = 0, exception_next_eip = -1.
_NOTE = re.compile(
    rb"(?:\x41)?\x0f\xb6."  # movzbl vector, %esi
    rb"(?:\x41|\x44|\x45)?\x89...\x00\x00"  # mov event_inj_err, error_code(env)
    rb"(?P<note>\x89[\xb0-\xb7]..\xff\xff)"  # mov %esi, exception_index(cs): below env
    rb"\xc7\x83..\x00\x00\x00\x00\x00\x00"  # movl $0, exception_is_int(env)
    rb"\x48\xc7\x83..\x00\x00\xff\xff\xff\xff"  # movq $-1, exception_next_eip(env)
    rb"\xf6\x05....\x02\x0f\x85...."  # qemu_loglevel & CPU_LOG_TB_IN_ASM?
    rb"\xba\x01\x00\x00\x00",  # do_interrupt_x86_hardirq(env, vector, 1)
    re.DOTALL,
)
_NOTHING = b"\x66\x0f\x1f\x44\x00\x00"
"""An instruction of six bytes that does nothing."""


def without_note(program: bytes) -> bytes | None:
    """The emulator *program* without that instruction; ``None`` where it is not found, or twice."""
    places = list(_NOTE.finditer(program))
    if len(places) != 1:
        return None
    start, end = places[0].span("note")
    return program[:start] + _NOTHING + program[end:]


def repaired(program: Path) -> Path:
    """A repaired copy of the emulator *program*, made once; else *program* itself.

    It is that itself where the place is not found or the copy cannot be written: guests run there
    too, and are lost now and then. The copy finds firmware and modules where the program does,
    relative to itself (``get_relocated_path()`` in ``util/cutils.c``).
    """
    status = program.stat()
    identity = f"{program.resolve()}\0{status.st_size}\0{status.st_mtime_ns}".encode()
    prefix = cache_dir("rig") / f"emulator-{hashlib.sha256(identity).hexdigest()[:16]}"
    copy = prefix / "bin" / program.name
    if copy.exists():
        return copy
    content = without_note(program.read_bytes())
    if content is None:
        log.warning("%s is an unknown build: guests on it are lost now and then", program)
        return program
    try:
        _write(copy, content, program.resolve().parents[1])
    except OSError as error:
        log.warning("no repaired emulator in %s: %s", prefix, error.strerror)
        return program
    return copy


def _write(copy: Path, content: bytes, original: Path) -> None:
    """The program *copy*, and beside its directory what lies beside that of the *original*."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    for name in ("share", "lib"):
        with contextlib.suppress(FileExistsError):
            (copy.parents[1] / name).symlink_to(original / name)
    write_whole(copy, content, 0o755)  # last: it stands for the whole
