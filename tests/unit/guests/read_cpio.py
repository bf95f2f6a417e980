"""Reads newc archives back, by the kernel's description of the format."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Item:
    inode: int
    mode: int
    links: int
    device: tuple[int, int]
    data: bytes


def read(archive: bytes) -> dict[str, Item]:
    """The members by name, in order; fails on anything that is not by the book."""
    items: dict[str, Item] = {}
    position = 0
    while True:
        assert position % 4 == 0
        header = archive[position : position + 110]
        assert header[:6] == b"070701"
        field = [int(header[6 + 8 * i : 14 + 8 * i], 16) for i in range(13)]
        name_size, size = field[11], field[6]
        raw = archive[position + 110 : position + 110 + name_size]
        assert raw[-1:] == b"\0"
        name = raw[:-1].decode()
        start = (position + 110 + name_size + 3) // 4 * 4
        assert (field[2], field[3], field[5], field[12]) == (0, 0, 0, 0)  # owner, time, checksum
        position = (start + size + 3) // 4 * 4
        if name == "TRAILER!!!":
            assert not archive[position:].strip(b"\0")
            return items
        assert name not in items
        items[name] = Item(
            field[0], field[1], field[4], (field[9], field[10]), archive[start : start + size]
        )
