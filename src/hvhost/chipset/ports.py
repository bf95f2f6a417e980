"""The I/O port space: which device answers which port.

Nobody at a port means what it means on a PC: reads give ones, writes are lost.
"""

from __future__ import annotations

from typing import Protocol

from hvhost.errors import LocalProtocolError


class PortDevice(Protocol):
    """Something on the port bus; ``offset`` counts from the first port of its range.

    ``size`` is 1, 2 or 4 bytes. An access may start inside the range and end outside it.
    """

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> None: ...


class PortBus:
    """Dispatches one port access to the device registered there."""

    def __init__(self) -> None:
        self._devices: dict[int, tuple[PortDevice, int]] = {}

    def register(self, ports: range, device: PortDevice) -> None:
        """Give *ports* to *device*; :class:`LocalProtocolError` if taken or not ports."""
        if not ports or ports.step != 1 or ports[0] < 0 or ports[-1] > 0xFFFF:
            raise LocalProtocolError(f"{ports} is not a range of I/O ports; register 0..0xffff.")
        for port in ports:
            if port in self._devices:
                raise LocalProtocolError(f"I/O port {port:#x} is already taken; move one device.")
        for port in ports:
            self._devices[port] = (device, ports[0])

    def read(self, port: int, size: int) -> int:
        """The *size* bytes at *port*, little-endian; all ones if nobody answers."""
        mask = (1 << 8 * size) - 1
        entry = self._devices.get(port)
        if entry is None:
            return mask
        return entry[0].read(port - entry[1], size) & mask

    def write(self, port: int, size: int, value: int) -> None:
        """Write *size* bytes at *port*; lost if nobody answers."""
        entry = self._devices.get(port)
        if entry is not None:
            entry[0].write(port - entry[1], size, value)
