"""A host and its guest in one process, which writes until it is killed: see test_storage_killed.

``python -m simulated.endless_writer IMAGE [careless]`` writes block after block, scattered over the
disk, flushes now and then, and says on its standard output how many writes were answered when a
flush was. *careless* is a host that answers flushes without one.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

from hvhost.storage.block import DiskUnit
from hvhost.storage.images import open_disk
from simulated.storage import StorageHost

BLOCKS = 1 << 16  # of 512 bytes
_STRIDE = 40503  # odd, so all blocks come before the first one comes again
_PER_FLUSH = 16


def lba(number: int) -> int:
    """Where the write *number* goes."""
    return number * _STRIDE % BLOCKS


def block(number: int) -> bytes:
    """What it writes."""
    return struct.pack("<Q", number + 1) * 64


def main(path: Path, *, careless: bool) -> None:
    disk = open_disk(path)
    if careless:
        disk.flush = lambda: None  # type: ignore[method-assign] # the mistake to be found
    driver = StorageHost.build(DiskUnit(disk)).connect()
    for number in range(BLOCKS):
        assert driver.write(lba(number), block(number)).ok
        if number % _PER_FLUSH == _PER_FLUSH - 1:
            assert driver.command(struct.pack(">BBIBHB", 0x35, 0, 0, 0, 0, 0)).ok
            print(number + 1, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), careless="careless" in sys.argv[2:])
