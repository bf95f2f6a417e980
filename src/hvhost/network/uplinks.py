"""Plugging in: from what an adapter is told to be connected to, to a wire."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvhost.machine.loop import Loop
from hvhost.network.config import AdapterConfig, Uplink, check_adapters
from hvhost.network.device import Wire
from hvhost.network.namespace import open_namespace
from hvhost.network.passt import PasstWire, check_passt, end_passt, start_passt
from hvhost.network.switch_client import info, join
from hvhost.network.wires import DescriptorWire, NoWire, check_tap, open_tap

#: The kernel's address in a host-only network that names none.
HOST_ONLY_ADDRESS = "192.168.77.1/24"


@dataclass(frozen=True, slots=True)
class Cable:
    """A wire, and what has to be let go with it."""

    wire: Wire
    close: Callable[[], None]
    namespace_pid: int = 0


def check_plugs(adapters: Sequence[AdapterConfig]) -> None:
    """Refuse what :func:`plug_in` would, as far as it is seen before anything is started."""
    check_adapters(adapters)
    for each in adapters:
        if each.uplink is Uplink.TAP:
            check_tap(each.target)
        elif each.uplink is Uplink.SWITCH:
            info(each.target)
        elif each.uplink is Uplink.NAT:
            check_passt()


def plug_in(
    config: AdapterConfig,
    loop: Loop,
    directory: Path,
    *,
    readable: Callable[[], None],
    writable: Callable[[], None],
    gone: Callable[[], None],
) -> Cable:
    """The cable that *config* asks for.

    :class:`hvhost.errors.HvHostError` when it cannot be had.
    """

    def wire_of(descriptor: int) -> DescriptorWire:
        return DescriptorWire(descriptor, loop, readable=readable, writable=writable, gone=gone)

    if config.uplink is Uplink.NONE:
        return Cable(NoWire(), lambda: None)
    if config.uplink is Uplink.TAP:
        tap = wire_of(open_tap(config.target))
        return Cable(tap, tap.close)
    if config.uplink is Uplink.HOST_ONLY:
        namespace = open_namespace(
            [("tap0", config.address or HOST_ONLY_ADDRESS)], services=config.dhcp
        )
        inside = wire_of(namespace.descriptors[0])

        def close() -> None:
            inside.close()
            namespace.close()

        return Cable(inside, close, namespace.pid)
    if config.uplink is Uplink.SWITCH:
        port = wire_of(join(config, directory.name))
        return Cable(port, port.close)
    process, stream = start_passt(config.forwards)
    nat = PasstWire(stream, loop, readable=readable, writable=writable, gone=gone)

    def end() -> None:
        nat.close()
        end_passt(process)

    return Cable(nat, end)
