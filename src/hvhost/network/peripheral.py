"""A machine's network adapters: cables that outlive its resets, and an adapter for each boot."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from hvhost.errors import HvHostError, RemoteProtocolError
from hvhost.network.config import AdapterConfig, check_adapters
from hvhost.network.report import AdapterInfo

if TYPE_CHECKING:
    from pathlib import Path

    from hvhost.machine.computer import Computer
    from hvhost.machine.loop import Loop
    from hvhost.network.device import NetworkAdapter
    from hvhost.network.uplinks import Cable
    from hvhost.vmbus.channel import Channel

#: An adapter is removed once its guest has sent nothing for so long, or will not be quiet.
QUIET_SECONDS = 0.25
QUIET_LIMIT_SECONDS = 3.0  # Linux heeds a link that goes down within two


class Port:
    """One adapter: its cable, and the device on the bus of this boot."""

    def __init__(self, config: AdapterConfig, loop: Loop, directory: Path) -> None:
        from hvhost.network.uplinks import plug_in

        self.config = config
        self.link = True
        self.adapter: NetworkAdapter | None = None
        self.channel: Channel | None = None
        self._loop = loop
        self._lock: threading.RLock | None = None
        self.cable: Cable = plug_in(
            config,
            loop,
            directory,
            readable=self._readable,
            writable=self._writable,
            gone=lambda: self.set_link(False),
        )

    def attach(self, computer: Computer) -> None:
        from hvhost.network.device import NetworkAdapter

        config = self.config
        adapter = NetworkAdapter(
            config.name,
            bytes.fromhex(config.mac.replace(":", "")),
            computer.memory,
            computer.bus,
            self.cable.wire,
            queues=config.queues or computer.config.cpus,
            may_spoof=config.spoofing,
        )
        adapter.process_later = self._process_later
        with computer.lock:
            adapter.state.link = self.link
            self.channel = computer.bus.add_device(adapter)
            self.adapter, self._lock = adapter, computer.lock

    def detach(self) -> None:
        self.adapter = self.channel = None

    def unplug(self, computer: Computer | None) -> None:
        """Take the adapter off the bus and the cable out of the wall."""
        channel = self.channel
        if computer is not None and channel is not None:
            self._quiesce()
            with computer.lock:
                computer.bus.remove_device(channel)
        self.detach()
        self.cable.close()

    def _quiesce(self) -> None:
        """Until the guest has nothing under way that would never be answered."""
        counts = [-1]

        def quiesce(adapter: NetworkAdapter) -> bool:
            counts.append(adapter.quiesce())
            return adapter.is_open

        deadline = time.monotonic() + QUIET_LIMIT_SECONDS
        while self._call(quiesce) and counts[-1] != counts[-2] and time.monotonic() < deadline:
            time.sleep(QUIET_SECONDS)

    def set_link(self, up: bool) -> None:
        self.link = up
        self._call(lambda adapter: adapter.set_link(up))

    # On the loop's thread, or with a request of the user's.

    def _call(self, what: Callable[[NetworkAdapter], object]) -> bool:
        lock = self._lock
        if lock is None:
            return False
        with lock:
            adapter, channel = self.adapter, self.channel
            if adapter is None or channel is None:
                return False
            try:
                return bool(what(adapter))
            except RemoteProtocolError as error:
                channel.fault(str(error))
                return False

    def _readable(self) -> None:
        if self._call(lambda adapter: adapter.readable()):
            self._loop.call_soon_threadsafe(self._readable)

    def _writable(self) -> None:
        self._call(lambda adapter: adapter.writable())

    def _process_later(self, channel: Channel) -> None:
        def process() -> None:
            if self._call(lambda adapter: channel.process()):
                self._loop.call_soon_threadsafe(process)

        self._loop.call_soon_threadsafe(process)

    def info(self) -> AdapterInfo:
        from hvhost.network.state import AdapterState

        config, adapter = self.config, self.adapter
        mac = bytes.fromhex(config.mac.replace(":", ""))
        state = adapter.state if adapter is not None else AdapterState(mac, link=self.link)
        version = state.version
        return AdapterInfo(
            name=config.name,
            mac=config.mac,
            current_mac=state.mac.hex(":"),
            instance=str(adapter.offer.interface_instance) if adapter is not None else "",
            plug=str(config.uplink) + (f":{config.target}" if config.target else ""),
            link=self.link,
            open=adapter is not None and adapter.is_open,
            version=None if version is None else f"{version >> 16}.{version & 0xFFFF}",
            mtu=state.mtu,
            channels=1 + state.subchannels,
            merging=state.merging,
            namespace_pid=self.cable.namespace_pid,
            **asdict(state.counters),
        )


class NetworkPeripheral:
    """All adapters of a machine; adapters may come and go while it runs."""

    def __init__(self, adapters: tuple[AdapterConfig, ...], loop: Loop, directory: Path) -> None:
        self._loop, self._directory = loop, directory
        self._ports: dict[str, Port] = {}
        self._computer: Computer | None = None
        self._changing = threading.Lock()
        try:
            for config in adapters:
                self._ports[config.name] = self._make(config)
        except BaseException:
            self.close()
            raise

    # For the machine.

    def attach(self, computer: Computer) -> None:
        with self._changing:
            self._computer = computer
            for port in self._ports.values():
                port.attach(computer)

    def detach(self) -> None:
        with self._changing:
            self._computer = None
            for port in self._ports.values():
                port.detach()

    def tick(self, now: float) -> None:
        """Nothing here happens by the clock."""

    def close(self) -> None:
        for port in self._ports.values():
            port.cable.close()
        self._ports.clear()

    # For the user; any thread.

    def adapters(self) -> list[AdapterInfo]:
        """All adapters, as they are now."""
        with self._changing:
            return [port.info() for port in self._ports.values()]

    def adapter(self, name: str) -> AdapterInfo:
        """The one of this name."""
        with self._changing:
            return self._port(name).info()

    def add(self, config: AdapterConfig) -> AdapterInfo:
        """Give the machine another adapter; the guest sees it come."""
        with self._changing:
            port = self._make(config)
            self._ports[config.name] = port
            if self._computer is not None:
                port.attach(self._computer)
            return port.info()

    def remove(self, name: str) -> None:
        """Take an adapter away; the guest sees it go."""
        with self._changing:
            port = self._port(name)
            port.unplug(self._computer)
            del self._ports[name]

    def set_link(self, name: str, up: bool) -> AdapterInfo:
        """Pull an adapter's cable, or plug it in again."""
        with self._changing:
            port = self._port(name)
            port.set_link(up)
            return port.info()

    def _port(self, name: str) -> Port:
        port = self._ports.get(name)
        if port is None:
            known = ", ".join(self._ports) or "none"
            raise HvHostError(f"there is no network adapter {name!r}; there are: {known}.")
        return port

    def _make(self, config: AdapterConfig) -> Port:
        check_adapters([*(port.config for port in self._ports.values()), config])
        return Port(config, self._loop, self._directory)
