"""A guest's key-value driver and daemon, in memory."""

from __future__ import annotations

import struct
from typing import Any

from simulated.driver import GuestService

BODY = 28  # bytes before the service's own message


def text(data: bytes | bytearray) -> str:
    return data.decode("utf-16-le").split("\0")[0]


class Daemon(GuestService):
    """hv_kvp_daemon behind its driver: one request at a time, pools in memory.

    ``forgets_values`` answers GET as Linux does: without the value.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.forgets_values = False
        self.pools: dict[int, dict[str, str]] = {number: {} for number in range(5)}

    def run(self, *, status: int = 0, answer: bool = True) -> int:
        packets = self.channel.read(1)
        for packet in packets:
            message = bytearray(packet.payload)
            if struct.unpack_from("<H", message, 12)[0] == 0:
                self._choose(message)
            else:
                self.requests.append((2, bytes(message[BODY:])))
                struct.pack_into("<I", message, 20, self.serve(message) or status)
            message[25] = 5
            if answer:
                assert self.channel.write(bytes(message), transaction_id=packet.transaction_id)
        return len(packets)

    def serve(self, message: bytearray) -> int:
        operation, number = message[BODY], message[BODY + 1]
        pool = self.pools.get(number, {})
        if operation == 3:
            (index,) = struct.unpack_from("<I", message, BODY + 4)
            if index >= len(pool):
                return 0x80070103
            self.put(message, BODY + 8, *list(pool.items())[index])
        elif operation == 2:
            return 0 if pool.pop(text(message[BODY + 8 : BODY + 520]), None) else 0x80070103
        elif operation in (0, 1):
            key, value = text(message[BODY + 16 : BODY + 528]), text(message[BODY + 528 :])
            if operation == 1:
                pool[key] = value
            elif key not in pool:
                return 0x80070103
            else:
                self.put(message, BODY + 4, key, "" if self.forgets_values else pool[key])
        else:
            return 0x80041002
        return 0

    @staticmethod
    def put(message: bytearray, offset: int, key: str, value: str) -> None:
        data = [each.encode("utf-16-le") + b"\0\0" for each in (key, value)]
        struct.pack_into("<III512s2048s", message, offset, 1, *map(len, data), *data)
