"""GPADLs: lists in one message or many, and every way to get them wrong."""

from __future__ import annotations

import os
import struct
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.errors import GuestMemoryError, RemoteProtocolError
from hvhost.partition.memory import PAGE_SIZE, GuestMemory, MemoryRegion
from hvhost.vmbus import gpadl
from hvhost.vmbus.gpadl import (
    GpadlTable,
    GpaRange,
    _row,
    pack_ranges,
    parse_ranges,
    range_views,
)

PAGES = 64
HIGH = 1 << 20  # page frame number of the second region


@pytest.fixture(scope="module")
def memory() -> GuestMemory:
    return GuestMemory(
        [
            MemoryRegion(0, memoryview(bytearray(PAGES * PAGE_SIZE))),
            MemoryRegion(HIGH * PAGE_SIZE, memoryview(bytearray(PAGES * PAGE_SIZE))),
        ]
    )


def a_range(count: int, offset: int, pfns: list[int]) -> GpaRange:
    return GpaRange(count, offset, array("Q", pfns))


@st.composite
def ranges(draw: st.DrawFn) -> tuple[GpaRange, ...]:
    out = []
    for _ in range(draw(st.integers(1, 4))):
        offset = draw(st.integers(0, PAGE_SIZE - 1))
        count = draw(st.integers(0, 40 * PAGE_SIZE))
        pages = (offset + count + PAGE_SIZE - 1) // PAGE_SIZE
        pfn = st.integers(0, PAGES - 1) | st.integers(HIGH, HIGH + PAGES - 1)
        out.append(a_range(count, offset, draw(st.lists(pfn, min_size=pages, max_size=pages))))
    return tuple(out)


@given(ranges())
def test_ranges_survive_the_way_there_and_back(items: tuple[GpaRange, ...]) -> None:
    assert parse_ranges(pack_ranges(items), len(items)) == items


@given(items=ranges(), data=st.data())
def test_a_list_may_come_in_any_number_of_messages(
    memory: GuestMemory, items: tuple[GpaRange, ...], data: st.DataObject
) -> None:
    table, encoded = GpadlTable(memory), pack_ranges(items)
    cuts = sorted(
        8 * cut for cut in data.draw(st.lists(st.integers(0, len(encoded) // 8), max_size=5))
    )
    pieces = [encoded[a:b] for a, b in zip([0, *cuts], [*cuts, len(encoded)], strict=True)]
    made = table.start(3, 9, len(items), len(encoded), pieces[0])
    for piece in pieces[1:]:
        if made is None:
            made = table.extend(9, piece)
    assert made is not None and made.ranges == items
    assert table.get(9, 3) is made
    assert table.pages == made.page_count == sum(len(item.pfns) for item in items)
    table.remove(9)
    assert (len(table), table.pages) == (0, 0)


@given(st.binary(max_size=200), st.integers(0, 0xFFFF))
def test_bytes_are_ranges_or_a_protocol_error(data: bytes, count: int) -> None:
    try:
        items = parse_ranges(data, count)
    except RemoteProtocolError:
        return
    assert data.startswith(pack_ranges(items))


@given(items=ranges())
def test_views_cover_a_range_and_join_neighbours(
    memory: GuestMemory, items: tuple[GpaRange, ...]
) -> None:
    for item in items:
        views = item.views(memory)
        assert sum(map(len, views)) == item.byte_count
        runs = sum(1 for a, b in zip(item.pfns, item.pfns[1:], strict=False) if b != a + 1)
        assert len(views) <= runs + 1


#: Two regions that touch, as after memory was added, and one that does not.
APART = ((0, 8), (8, 8), (HIGH, 8))
CONTENT = {start: os.urandom(count * PAGE_SIZE) for start, count in APART}


def touching() -> GuestMemory:
    return GuestMemory(
        [
            MemoryRegion(start * PAGE_SIZE, memoryview(bytearray(CONTENT[start])))
            for start, _ in APART
        ]
    )


def content(pfn: int, offset: int, length: int) -> bytes:
    (start,) = (start for start, count in APART if start <= pfn < start + count)
    at = (pfn - start) * PAGE_SIZE + offset
    return CONTENT[start][at : at + length]


@st.composite
def page_buffers(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """As drivers name them: (length, offset, pfn), mostly whole pages and often neighbours."""
    items: list[tuple[int, int, int]] = []
    for _ in range(draw(st.integers(1, 20))):
        pfn = draw(st.integers(0, 15) | st.integers(HIGH, HIGH + 7))
        near: bool = draw(st.booleans())
        behind = items[-1][2] + 1 if items else -1
        if near and any(start <= behind < start + count for start, count in APART):
            pfn = behind
        offset = draw(st.just(0) | st.integers(0, PAGE_SIZE - 1))
        left = PAGE_SIZE - offset
        items.append((draw(st.just(left) | st.integers(0, left)), offset, pfn))
    return items


@given(page_buffers())
def test_pages_in_ranges_of_their_own_are_joined(items: list[tuple[int, int, int]]) -> None:
    data = b"before.." + b"".join(struct.pack("<IIQ", *item) for item in items)
    if any(length == offset == 0 for length, offset, _ in items):
        return  # such a range has no page
    views = range_views(data, len(items), 8, touching())
    assert b"".join(views) == b"".join(content(pfn, at, size) for size, at, pfn in items)
    starts = [(pfn << 12) + at for _, at, pfn in items]
    ends = [(pfn << 12) + at + size for size, at, pfn in items]
    runs = 1 + sum(a != b for a, b in zip(ends, starts[1:], strict=False))
    if all(size for size, _, _ in items) and not {7, 8} <= {pfn for _, _, pfn in items}:
        assert len(views) == runs


@st.composite
def pieces(draw: st.DrawFn) -> list[tuple[int, int, list[int]]]:
    """As drivers of today name them: (length, offset, pages), mostly pages in a row."""
    items = []
    for _ in range(draw(st.integers(1, 8))):
        count = draw(st.integers(1, 8))
        start = draw(st.integers(0, 16 - count) | st.just(HIGH))
        pfns = list(range(start, start + count))
        if draw(st.integers(0, 3)) == 0:
            pfns = draw(st.permutations(pfns))
        offset = draw(st.just(0) | st.integers(0, PAGE_SIZE - 1))
        room = count * PAGE_SIZE - offset
        items.append(
            (draw(st.just(room) | st.integers(max(room - PAGE_SIZE, 0) + 1, room)), offset, pfns)
        )
    return items


def packed(items: list[tuple[int, int, list[int]]]) -> bytes:
    return b"".join(
        struct.pack(f"<II{len(pfns)}Q", length, offset, *pfns) for length, offset, pfns in items
    )


@given(pieces())
def test_pieces_of_a_packet_are_joined(items: list[tuple[int, int, list[int]]]) -> None:
    views = range_views(b"before.." + packed(items), len(items), 8, touching())
    expected = b""
    for length, offset, pfns in items:
        expected += b"".join(content(pfn, 0, PAGE_SIZE) for pfn in pfns)[offset : offset + length]
    assert b"".join(views) == expected
    in_rows = all(pfns == list(range(pfns[0], pfns[0] + len(pfns))) for _, _, pfns in items)
    if in_rows and not {7, 8} <= {pfn for _, _, pfns in items for pfn in pfns}:
        starts = [(pfns[0] << 12) + offset for _, offset, pfns in items]
        ends = [start + length for start, (length, _, _) in zip(starts, items, strict=True)]
        assert len(views) == 1 + sum(map(int.__ne__, ends, starts[1:]))


@pytest.mark.parametrize(
    "bad",
    [
        (2 * PAGE_SIZE, 0, [2**64 - 1, 0]),
        (2 * PAGE_SIZE, 0, [2**64 - 2, 2**64 - 1]),
        (3 * PAGE_SIZE, 0, [3, 9, 5]),  # as if in a row, by the first and the last
        (2 * PAGE_SIZE, 0, [15, 16]),
        (100 * PAGE_SIZE, 0, list(range(100))),
        (2 * PAGE_SIZE, PAGE_SIZE, [1, 2, 3]),
    ],
)
def test_pieces_that_are_not_what_they_seem(bad: tuple[int, int, list[int]]) -> None:
    items = [(2 * PAGE_SIZE, 0, [13, 14]), bad]
    if bad[2] == [3, 9, 5]:
        views = range_views(packed(items), 2, 0, touching())
        assert b"".join(views[1:]) == b"".join(content(pfn, 0, PAGE_SIZE) for pfn in bad[2])
        return
    with pytest.raises(RemoteProtocolError):
        range_views(packed(items), 2, 0, touching())


def test_pieces_that_are_neighbours_are_one_view() -> None:
    items = [(100, 8, [9]), (2 * PAGE_SIZE, 0, [2, 3]), (PAGE_SIZE + 9, 0, [4, 5]), (5, 9, [5])]
    views = range_views(packed(items), 4, 0, touching())
    assert [len(view) for view in views] == [100, 3 * PAGE_SIZE + 14]
    assert views[1] == b"".join(content(pfn, 0, PAGE_SIZE) for pfn in (2, 3, 4, 5))[: len(views[1])]


@pytest.mark.parametrize("offset", [0, 8])
def test_a_piece_without_bytes(offset: int) -> None:
    items = [(2 * PAGE_SIZE, 0, [13, 14]), (0, offset, [3] if offset else []), (5, 1, [4])]
    views = range_views(packed(items), 3, 0, touching())
    assert b"".join(views) == content(13, 0, PAGE_SIZE) + content(14, 0, PAGE_SIZE) + content(
        4, 1, 5
    )
    assert all(views)


def test_no_long_list_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(numbers: bytes) -> int:
        assert len(numbers) <= 8 * 64, "a guest could make the host keep as much as it likes"
        return _row(numbers)

    memory = GuestMemory([MemoryRegion(0, memoryview(bytearray(128 * PAGE_SIZE)))])
    monkeypatch.setattr(gpadl, "_row", row)
    for count in (64, 65):
        items = [(count * PAGE_SIZE, 0, list(range(count))), (5, 0, [100])]
        assert [len(view) for view in range_views(packed(items), 2, 0, memory)] == [
            count * PAGE_SIZE,
            5,
        ]


@pytest.mark.parametrize("cut", [1, 8, 9, 16, 24, 25, 32])
def test_a_list_of_pieces_that_ends_too_early(cut: int) -> None:
    data = packed([(100, 0, [3]), (2 * PAGE_SIZE, 0, [13, 14])])
    with pytest.raises(RemoteProtocolError):
        range_views(data[:-cut], 2, 0, touching())


@pytest.mark.parametrize("bad", [(1, 0, 16), (16, PAGE_SIZE - 8, 15), (1, 0, 2**64 - 1)])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_page_that_is_not_ram_spoils_the_list(bad: tuple[int, int, int], place: int) -> None:
    items = [(PAGE_SIZE, 0, 14), (PAGE_SIZE, 0, 15)]
    items.insert(place, bad)
    data = b"".join(struct.pack("<IIQ", *item) for item in items)
    with pytest.raises(RemoteProtocolError):
        range_views(data, 3, 0, touching())


def test_pages_behind_each_other_in_two_regions_are_two_views() -> None:
    whole = CONTENT[0][-PAGE_SIZE:] + CONTENT[8][:PAGE_SIZE]
    (item,) = parse_ranges(struct.pack("<IIQQ", 2 * PAGE_SIZE - 16, 8, 7, 8), 1)
    assert b"".join(item.views(touching())) == whole[8:-8]
    mixed = a_range(3 * PAGE_SIZE, 0, [7, 8, 3])
    assert b"".join(mixed.views(touching())) == whole + content(3, 0, PAGE_SIZE)


@pytest.mark.parametrize(
    "pfns", [[5, 6, 7, 8], [5, 7, 6, 8], [5, 5, 5, 8], [8, 7, 6, 5], [HIGH, 6, 7, HIGH + 3]]
)
@pytest.mark.parametrize(("count", "offset"), [(16384, 0), (12300, 4000), (12289, 0)])
def test_views_hold_the_pages_named_in_any_order(pfns: list[int], count: int, offset: int) -> None:
    marked = GuestMemory(
        [
            MemoryRegion(
                start * PAGE_SIZE,
                memoryview(
                    bytearray(b"".join(bytes((mark,)) * PAGE_SIZE for mark in range(first, last)))
                ),
            )
            for start, first, last in ((0, 0, 16), (HIGH, 100, 116))
        ]
    )
    marks = [pfn if pfn < HIGH else pfn - HIGH + 100 for pfn in pfns]
    whole = b"".join(bytes((mark,)) * PAGE_SIZE for mark in marks)
    views = a_range(count, offset, pfns).views(marked)
    assert b"".join(views) == whole[offset : offset + count]


@pytest.mark.parametrize("pfns", [[5, 6], [5, 7]])
def test_views_never_leave_the_pages_named(memory: GuestMemory, pfns: list[int]) -> None:
    views = a_range(3 * PAGE_SIZE, 8, pfns).views(memory)
    assert sum(map(len, views)) == 2 * PAGE_SIZE - 8


def test_views_are_the_guests_memory_in_order(memory: GuestMemory) -> None:
    item = a_range(PAGE_SIZE + 10, 4090, [5, 6, HIGH])
    views = item.views(memory)
    assert [len(view) for view in views] == [6 + PAGE_SIZE, 4]
    views[0][:] = b"a" * (6 + PAGE_SIZE)
    views[1][:] = b"bbbb"
    assert memory.read(5 * PAGE_SIZE + 4088, 4) == b"\0\0aa"
    assert memory.read(7 * PAGE_SIZE - 1, 2) == b"a\0"
    assert memory.read(HIGH * PAGE_SIZE, 5) == b"bbbb\0"


@pytest.mark.parametrize(
    ("count", "ranges_", "size", "why"),
    [
        (0, b"", 0, "announces 0 ranges"),
        (0, bytes(8), 8, "announces 0 ranges"),
        (2, bytes(8), 8, "announces 2 ranges in 8 bytes"),
        (1, bytes(12), 12, "announces 1 ranges in 12 bytes"),
        (1, pack_ranges((a_range(1, 0, [1]),))[:8], 8, "needs 1 page numbers, the list has 0"),
        (1, pack_ranges((a_range(1, PAGE_SIZE, [1, 1]),)), 24, "behind its first page"),
        (1, pack_ranges((a_range(1, 0, [1, 2]),)), 24, "lists more pages than it describes"),
        (1, pack_ranges((a_range(1, 0, [PAGES]),)), 16, "is not RAM"),
        (1, pack_ranges((a_range(1, 0, [2**64 - 1]),)), 16, "is not RAM"),
        (1, pack_ranges((a_range(PAGE_SIZE + 1, 0, [PAGES - 1, PAGES]),)), 24, "is not RAM"),
        (1, pack_ranges((a_range(2**32 - 1, 0, [1]),)), 16, "needs 1048576 page numbers"),
        (2, pack_ranges((a_range(PAGE_SIZE, 0, [1]),)), 16, "range 1 of 2 is missing"),
        (1, pack_ranges((a_range(1, 0, [1]),)) + bytes(8), 16, "was sent 24 bytes on top of 0"),
        (1, pack_ranges((a_range(1, 0, [1]),))[:12], 16, "was sent 12 bytes on top of 0"),
    ],
)
def test_a_wrong_list_is_refused_and_forgotten(
    memory: GuestMemory, count: int, ranges_: bytes, size: int, why: str
) -> None:
    table = GpadlTable(memory)
    with pytest.raises(RemoteProtocolError, match=why):
        table.start(1, 1, count, size, ranges_)
    assert (len(table), table.pages) == (0, 0)


def test_bodies_that_do_not_fit_are_refused(memory: GuestMemory) -> None:
    table = GpadlTable(memory)
    encoded = pack_ranges((a_range(3 * PAGE_SIZE, 0, [1, 2, 3]),))
    assert table.start(1, 1, 1, len(encoded), encoded[:16]) is None
    with pytest.raises(RemoteProtocolError, match="was sent 24 bytes on top of 16"):
        table.extend(1, encoded[8:])
    with pytest.raises(RemoteProtocolError, match="not waiting for page numbers"):
        table.extend(1, encoded[16:])
    with pytest.raises(RemoteProtocolError, match="not waiting for page numbers"):
        table.extend(2, b"")


def test_a_number_is_used_once(memory: GuestMemory) -> None:
    table = GpadlTable(memory)
    encoded = pack_ranges((a_range(2 * PAGE_SIZE, 0, [1, 2]),))
    table.start(1, 1, 1, len(encoded), encoded)
    table.start(1, 2, 1, len(encoded), encoded[:8])
    for handle in (1, 2):
        with pytest.raises(RemoteProtocolError, match="exists already"):
            table.start(1, handle, 1, len(encoded), encoded)
    assert table.get(1, 1).page_count == 2


def test_what_a_guest_may_lend_is_bounded(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpadl, "MAX_GPADLS", 3)
    monkeypatch.setattr(gpadl, "MAX_PAGES", 10)
    table = GpadlTable(memory)
    encoded = pack_ranges((a_range(5 * PAGE_SIZE, 0, [1, 2, 3, 4, 5]),))
    table.start(1, 1, 1, len(encoded), encoded)
    table.start(1, 2, 1, len(encoded), encoded[:8])  # unfinished ones count as well
    one = pack_ranges((a_range(1, 0, [1]),))
    with pytest.raises(RemoteProtocolError, match="exceeds the 10 pages"):
        table.start(1, 3, 1, len(one), one)
    table.start(1, 3, 1, 8, bytes(8))
    with pytest.raises(RemoteProtocolError, match="one more than the 3"):
        table.start(1, 4, 1, 8, bytes(8))
    table.remove(2)
    table.start(1, 4, 1, len(one), one)
    assert table.pages == 6


def test_lists_belong_to_their_channel(memory: GuestMemory) -> None:
    table, one = GpadlTable(memory), pack_ranges((a_range(1, 0, [1]),))
    table.start(1, 1, 1, len(one), one)
    table.start(1, 2, 1, len(one), one[:8])
    table.start(2, 3, 1, len(one), one)
    with pytest.raises(RemoteProtocolError, match="none of channel 2"):
        table.get(1, 2)
    with pytest.raises(RemoteProtocolError, match="none of channel 1"):
        table.get(2, 1)  # unfinished
    assert [table.channel_of(handle) for handle in (1, 2, 3, 4)] == [1, 1, 2, None]
    table.remove_channel(1)
    assert [table.channel_of(handle) for handle in (1, 2, 3)] == [None, None, 2]
    with pytest.raises(RemoteProtocolError, match="does not exist"):
        table.remove(1)
    assert table.pages == 1


@pytest.mark.parametrize(
    ("items", "why"),
    [
        ((a_range(1, 0, [1]), a_range(1, 0, [2])), "has 2 ranges"),
        ((a_range(2 * PAGE_SIZE, 8, [1, 2, 3]),), "not made of whole pages"),
        ((a_range(PAGE_SIZE + 8, 0, [1, 2]),), "not made of whole pages"),
    ],
)
def test_rings_are_one_range_of_whole_pages(
    memory: GuestMemory, items: tuple[GpaRange, ...], why: str
) -> None:
    table, encoded = GpadlTable(memory), pack_ranges(items)
    made = table.start(1, 1, len(items), len(encoded), encoded)
    assert made is not None
    with pytest.raises(RemoteProtocolError, match=why):
        made.ring_pages()


def test_memory_errors_are_protocol_errors() -> None:
    assert issubclass(GuestMemoryError, RemoteProtocolError)
