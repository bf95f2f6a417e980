"""Frames from one tap device to another and back, by the plainest loop that Python can be.

``python -m bench.tap_loop TAP TAP`` takes the first, makes the second, prints a line, and goes on
until it is killed: what an adapter in Python could reach if it had nothing else to do.
"""

from __future__ import annotations

import os
import select
import sys

from hvhost.network.frame import FRAME_LIMIT, VIRTIO_NET_HDR_SIZE
from hvhost.network.wires import open_tap


def main() -> int:
    one, two = open_tap(sys.argv[1]), open_tap(sys.argv[2], make=True)
    other = {one: two, two: one}
    epoll = select.epoll()
    for descriptor in other:
        epoll.register(descriptor, select.EPOLLIN)
    print("ready", flush=True)
    buffer = memoryview(bytearray(VIRTIO_NET_HDR_SIZE + FRAME_LIMIT))
    while True:
        for descriptor, _ in epoll.poll():
            try:
                while size := os.readv(descriptor, [buffer]):
                    os.writev(other[descriptor], [buffer[:size]])
            except OSError:  # nothing more, or nobody takes it: the other one is down
                pass


if __name__ == "__main__":
    sys.exit(main())
