"""A DHCP client for kernels that tests make: raw frames on ``tap0``, so that it needs no address.

Run as a program inside the namespace, with the hardware address, perhaps a host name, and how many
seconds to wait for each answer; prints what it was given as JSON. :func:`lease` does that.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hvhost.verify.wire import Witness

DISCOVER, REQUEST, ACK = 1, 3, 5
MASK, ROUTER, DNS, HOST_NAME, REQUESTED, KIND, SERVER = 1, 3, 6, 12, 50, 53, 54
SECONDS = 10.0


def lease(kernel: Witness, name: str = "", seconds: float = SECONDS) -> dict[str, Any]:
    """Have a namespace's kernel ask on ``tap0``: its address, mask, gateway and dns, or ``None``.

    :class:`hvhost.errors.HvHostError`, with ``TimeoutError`` in it, if nobody answers.
    """
    link = json.loads(kernel.command("ip", "-json", "link", "show", "tap0"))[0]
    said = kernel.command(sys.executable, str(Path(__file__)), link["address"], name, str(seconds))
    found: dict[str, Any] = json.loads(said)
    return found


def option(code: int, data: bytes) -> bytes:
    return bytes((code, len(data))) + data


def options(message: bytes) -> dict[int, bytes]:
    found, at = {}, 240
    while message[at] != 255:
        found[message[at]] = message[at + 2 : at + 2 + message[at + 1]]
        at += 2 + message[at + 1]
    return found


def broadcast(mac: bytes, message: bytes) -> bytes:
    """A frame from a client without an address to all servers."""
    udp = struct.pack("!HHHH", 68, 67, 8 + len(message), 0)
    ip = bytearray(struct.pack("!BBHHHBBH", 0x45, 0, 28 + len(message), 0, 0, 64, 17, 0))
    ip += bytes(4) + b"\xff" * 4
    total = sum(struct.unpack("!10H", ip))
    total = (total & 0xFFFF) + (total >> 16)
    ip[10:12] = struct.pack("!H", ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF)
    return b"\xff" * 6 + mac + b"\x08\x00" + bytes(ip) + udp + message


def main(mac: bytes, name: bytes, seconds: float) -> None:
    head = struct.pack("!BBBBIHH", 1, 1, 6, 0, 99, 0, 0x8000) + bytes(16) + mac
    head = head.ljust(236, b"\0") + bytes((99, 130, 83, 99))
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800)) as sock:
        sock.bind(("tap0", 0))
        sock.settimeout(seconds)

        def ask(kind: int, *wishes: bytes) -> bytes:
            message = head + option(KIND, bytes((kind,))) + b"".join(wishes) + b"\xff"
            sock.send(broadcast(mac, message))
            while True:
                frame = sock.recv(4096)
                if frame[23] == 17 and frame[36:38] == b"\x00\x44":
                    return frame[42:]

        offer = ask(DISCOVER)
        wishes = [option(REQUESTED, offer[16:20]), option(SERVER, options(offer)[SERVER])]
        if name:
            wishes.append(option(HOST_NAME, name))
        given = options(ask(REQUEST, *wishes))
    assert given[KIND] == bytes((ACK,)), given
    found: dict[str, str | None] = {"address": socket.inet_ntoa(offer[16:20])}
    for word, code in (("mask", MASK), ("gateway", ROUTER), ("dns", DNS)):
        found[word] = socket.inet_ntoa(given[code][:4]) if code in given else None
    print(json.dumps(found))


if __name__ == "__main__":
    main(bytes.fromhex(sys.argv[1].replace(":", "")), sys.argv[2].encode(), float(sys.argv[3]))
