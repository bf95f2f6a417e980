"""``layout.h``: everything has room, nothing overlaps, words are aligned; the agent compiles."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest

from hvhost.kvm import remote
from hvhost.rig import layout


def assert_apart(size: int, *parts: tuple[str, int, int]) -> None:
    """*parts* (name, offset, size) lie within *size*, apart from each other, at whole words."""
    end, before = 0, "the start"
    for name, offset, length in sorted(parts, key=lambda part: part[1]):
        assert offset % 4 == 0, f"{name} is not aligned"
        assert offset >= end, f"{before} reaches into {name}"
        end, before = offset + length, name
    assert end <= size, f"{before} reaches beyond {size:#x}"


def test_header_page() -> None:
    table = layout.MAXIMUM_SESSIONS * layout.SESSION_ENTRY_SIZE
    assert_apart(
        4096,
        ("magic", layout.HEADER_MAGIC, 4),
        ("version", layout.HEADER_VERSION, 4),
        ("agent ready", layout.HEADER_AGENT_READY, 4),
        ("ping", layout.HEADER_PING, 4),
        ("pong", layout.HEADER_PONG, 4),
        ("sessions", layout.HEADER_SESSIONS, table),
    )
    assert_apart(
        layout.SESSION_ENTRY_SIZE,
        ("state", layout.SESSION_STATE, 4),
        ("peer", layout.SESSION_PEER, 4),
        ("control", layout.SESSION_CONTROL, 8),
    )
    assert layout.SESSION_CONTROL % 8 == 0


def test_control_block() -> None:
    assert_apart(
        layout.CONTROL_SIZE,
        ("raised head", layout.CONTROL_RAISED_HEAD, 4),
        ("raised tail", layout.CONTROL_RAISED_TAIL, 4),
        ("asleep", layout.CONTROL_ASLEEP, 4),
        ("raised ring", layout.CONTROL_RAISED_RING, 4 * layout.RAISED_RING_ENTRIES),
        ("queued", layout.CONTROL_QUEUED, layout.MAXIMUM_IN_EVENTS),
        (
            "mailbox",
            layout.CONTROL_MAILBOX,
            layout.MAILBOX_BUFFER + layout.CONTROL_BUFFER_SIZE,
        ),
        ("coalesced", layout.CONTROL_COALESCED, layout.COALESCED_SIZE),
        (
            "processors",
            layout.CONTROL_PROCESSORS,
            layout.MAXIMUM_PROCESSORS * layout.PROCESSOR_STRIDE,
        ),
    )
    assert layout.CONTROL_SIZE % 4096 == 0
    assert layout.MAXIMUM_IN_EVENTS <= layout.RAISED_RING_ENTRIES, "each event is queued once"
    assert layout.RAISED_RING_ENTRIES & (layout.RAISED_RING_ENTRIES - 1) == 0, "counts wrap at 2^32"


def test_a_processors_part() -> None:
    assert_apart(
        layout.PROCESSOR_STRIDE,
        ("mailbox", 0, layout.MAILBOX_BUFFER + layout.PROCESSOR_BUFFER_SIZE),
        ("kvm_run", layout.PROCESSOR_RUN, layout.RUN_IMAGE_SIZE),
    )
    assert layout.PROCESSOR_RUN % 4096 == 0
    assert layout.RUN_IMAGE_SIZE >= 2 * 4096, "the page of port data follows the first"


def test_mailbox() -> None:
    assert_apart(
        layout.MAILBOX_BUFFER,
        ("state", layout.MAILBOX_STATE, 4),
        ("operation", layout.MAILBOX_OPERATION, 4),
        ("target", layout.MAILBOX_TARGET, 4),
        ("handle", layout.MAILBOX_RESULT_HANDLE, 4),
        ("request", layout.MAILBOX_REQUEST_CODE, 8),
        ("argument", layout.MAILBOX_ARGUMENT, 8),
        ("uses buffer", layout.MAILBOX_USES_BUFFER, 4),
        ("fixups", layout.MAILBOX_FIXUPS, 4),
        ("result", layout.MAILBOX_RESULT, 8),
        ("asleep", layout.MAILBOX_ASLEEP, 4),
        ("table", layout.MAILBOX_FIXUP_TABLE, layout.MAXIMUM_FIXUPS * layout.FIXUP_SIZE),
    )
    for word in (layout.MAILBOX_REQUEST_CODE, layout.MAILBOX_ARGUMENT, layout.MAILBOX_RESULT):
        assert word % 8 == 0
    assert remote._FIXUP.size == layout.FIXUP_SIZE
    # One pack writes operation to fixup count; its fields must lie where the agent reads them.
    fields = [
        layout.MAILBOX_OPERATION,
        layout.MAILBOX_TARGET,
        layout.MAILBOX_RESULT_HANDLE,
        layout.MAILBOX_REQUEST_CODE,
        layout.MAILBOX_ARGUMENT,
        layout.MAILBOX_USES_BUFFER,
        layout.MAILBOX_FIXUPS,
    ]
    assert [place - layout.MAILBOX_OPERATION for place in fields] == [0, 4, 8, 12, 20, 28, 32]
    assert remote._CALL.size == layout.MAILBOX_RESULT - layout.MAILBOX_OPERATION


def test_control_blocks_of_all_sessions() -> None:
    offsets = [layout.control_offset(index) for index in range(layout.MAXIMUM_SESSIONS)]
    assert offsets[0] >= 4096
    assert all(b - a == layout.CONTROL_SIZE for a, b in itertools.pairwise(offsets))
    assert all(offset % 4096 == 0 for offset in offsets), "they are mapped one by one"
    assert offsets[-1] + layout.CONTROL_SIZE <= layout.CONTROL_AREA
    assert layout.CONTROL_AREA % (2 << 20) == 0


def test_vectors() -> None:
    assert layout.FIRST_FREE_VECTOR == 1 + layout.MAXIMUM_SESSIONS
    assert layout.CONTROL_DOORBELL == 1 + layout.MAXIMUM_PROCESSORS
    assert layout.PEER_VECTORS == layout.CONTROL_DOORBELL + 1
    assert layout.PEER_VECTORS <= layout.VECTORS, "QEMU takes no more of any peer"
    most = remote._VECTORS_PER_MACHINE + remote._VECTORS_PER_PROCESSOR * 32
    assert most <= layout.VECTORS - layout.FIRST_FREE_VECTOR, "32 processors have room"
    assert layout.MAXIMUM_HANDLES < layout.NO_HANDLE
    # SCM_MAX_FD is 253: a session's descriptors are sent in one message.
    free = layout.VECTORS - layout.FIRST_FREE_VECTOR
    assert 2 + free + layout.PEER_VECTORS <= 253


def test_names_that_are_not_there() -> None:
    with pytest.raises(AttributeError, match=r"layout\.h defines no NOTHING"):
        layout.NOTHING  # noqa: B018


@pytest.mark.parametrize(
    "names",
    [
        [name for name in layout._values if name.startswith("OPERATION_")],
        ["SESSION_FREE", "SESSION_OPENING", "SESSION_OPEN", "SESSION_CLOSING"],
        ["MAILBOX_IDLE", "MAILBOX_REQUEST", "MAILBOX_DONE"],
        ["FIXUP_ADD_BAR", "FIXUP_DESCRIPTOR", "FIXUP_ADD_BUFFER"],
    ],
)
def test_operations_and_states_differ(names: list[str]) -> None:
    assert len({layout._values[name] for name in names}) == len(names) >= 3


@pytest.mark.parametrize("optimise", ["-O0", "-O2"])
def test_the_agent_compiles_without_a_warning(optimise: str, tmp_path: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    done = subprocess.run(
        [
            *(compiler, optimise, "-Wall", "-Wextra", "-Werror", "-pthread", "-c"),
            *("-o", str(tmp_path / "agent.o"), str(layout.AGENT)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0


def test_the_agent_is_for_the_layout_of_this_version() -> None:
    text = layout.AGENT.read_text()
    for name in ("RIG_MAGIC", "RIG_VERSION"):
        assert name in text
        assert name in layout._values
