"""hv_balloon in memory: what Linux's driver does with the host's messages, as its source has it."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from simulated.driver import GuestChannel

PAGES_IN_2M = 512
CHUNK = 32768  # pages of 128 MiB
START_MASK = (1 << 40) - 1


def message(kind: int, body: bytes, number: int) -> bytes:
    return struct.pack("<HHI", kind, 8 + len(body), number) + body


def words(ranges: list[tuple[int, int]]) -> bytes:
    return b"".join(struct.pack("<Q", start | count << 40) for start, count in ranges)


@dataclass
class BalloonDriver:
    """A guest's driver with *free* pages to give, from frame *first* on, down to *floor*."""

    channel: GuestChannel
    free: int
    first: int = 0x100
    floor: int = 0
    version: int = 0x20000
    alignment: int = 7
    abilities: int = 3
    answers_hot_add: tuple[int, int] | None = None
    ballooned: set[int] = field(default_factory=set)
    added: list[tuple[int, int]] = field(default_factory=list)
    regions: list[tuple[int, int]] = field(default_factory=list)
    maximum: int | None = None
    version_answers: list[bool] = field(default_factory=list)
    connected: bool = False
    number: int = 1000
    _more: list[tuple[int, int]] = field(default_factory=list)

    def send(self, kind: int, body: bytes) -> None:
        self.number += 1
        assert self.channel.write(message(kind, body, self.number))

    def connect(self, versions: tuple[int, ...] = (0x20000, 0x10000, 3)) -> bool:
        for number, version in enumerate(versions):
            self.send(1, struct.pack("<II", version, number == len(versions) - 1))
            self.run()
            if self.version_answers[-1]:
                self.version = version
                self.send(
                    3, struct.pack("<QQQ", self.abilities | self.alignment << 2, 0, 2**64 - 1)
                )
                self.run()
                return self.connected
        return False

    def status(self, available: int, committed: int) -> None:
        self.send(5, struct.pack("<QQQQII", available, committed, 0, 0, 0, 0))

    def run(self) -> None:
        """Handle what the host sent."""
        for packet in self.channel.read():
            kind, size, _ = struct.unpack_from("<HHI", packet.payload)
            getattr(self, f"_on_{kind}")(packet.payload[8:size])

    def _on_2(self, body: bytes) -> None:
        self.version_answers.append(bool(body[0] & 1))

    def _on_4(self, body: bytes) -> None:
        self.connected = bool(body[0] & 1)

    def _on_12(self, body: bytes) -> None:
        _, size, kind, length, pages = struct.unpack("<IIIIQ", body)
        assert (size, kind, length) == (16, 0, 8)
        self.maximum = pages

    def _on_6(self, body: bytes) -> None:
        (wanted, _) = struct.unpack("<II", body)
        wanted = max(0, min(wanted, self.free - self.floor))
        frame, unit, ranges = self.first, PAGES_IN_2M, []
        self.free -= wanted
        while wanted:
            unit = unit if wanted >= unit else 1
            while frame in self.ballooned:
                frame += 1
            ranges.append((frame, unit))
            self.ballooned.update(range(frame, frame + unit))
            frame += unit
            wanted -= unit
        groups = [ranges[i : i + 500] for i in range(0, len(ranges), 500)] or [[]]
        for group in groups:
            more = group is not groups[-1]
            self.send(7, struct.pack("<II", 0, len(group) << 1 | more) + words(group))

    def _on_8(self, body: bytes) -> None:
        more, count = struct.unpack_from("<II", body)
        assert len(body) <= 4088
        for (word,) in struct.iter_unpack("<Q", body[8 : 8 + 8 * count]):
            frames = set(range(word & START_MASK, (word & START_MASK) + (word >> 40)))
            assert frames <= self.ballooned
            self.ballooned -= frames
            self.free += len(frames)
        if not more & 1:
            self.send(9, b"")

    def _on_10(self, body: bytes) -> None:
        ranges = [(word & START_MASK, word >> 40) for (word,) in struct.iter_unpack("<Q", body)]
        start, count = ranges[0]
        if self.answers_hot_add is not None:
            self.send(11, struct.pack("<II", *self.answers_hot_add))
            return
        if len(ranges) > 1:  # a region of its own: whole blocks that nothing else is in
            region = ranges[1]
            assert region[0] % CHUNK == region[1] % CHUNK == 0 and region[0] == start
            assert all(region[0] >= a + b or a >= sum(region) for a, b in self.regions)
            self.regions.append(region)
        else:  # pfn_covered(): behind what that region has
            assert any(a <= start and start + count <= a + b for a, b in self.regions)
        self.added.append((start, count))
        self.send(11, struct.pack("<II", count, 1))
