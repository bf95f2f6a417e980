"""A machine alive: a computer that may be reset, its serial ports, its events."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from hvhost.errors import HvHostError
from hvhost.firmware.image import KernelImage
from hvhost.kvm.transport import Transport
from hvhost.machine.board import Board
from hvhost.machine.clock_watch import watch_clock
from hvhost.machine.computer import Computer, Notices
from hvhost.machine.copier import Copier
from hvhost.machine.exchange import KvpExchange
from hvhost.machine.host_items import host_items
from hvhost.machine.loading import build_board, not_built
from hvhost.machine.loop import Loop
from hvhost.machine.model import (
    ChannelInfo,
    ClockSample,
    CopyProgress,
    CrashReport,
    HeartbeatStatus,
    IpSettings,
    KvpPool,
    KvpRecord,
    MachineConfig,
    MachineEvent,
    MachineInfo,
    MachineState,
    ProcessorInfo,
    ServiceInfo,
    ShutdownAction,
)
from hvhost.machine.peripheral import Peripheral, PeripheralElsewhere
from hvhost.services.filecopy import FileCopy
from hvhost.services.heartbeat import INTERVAL, Heartbeat
from hvhost.services.kvp import Kvp
from hvhost.services.shutdown import Shutdown
from hvhost.services.timesync import TimeSync, read_clocks
from hvhost.services.timesync_protocol import TimeSample
from hvhost.services.vss import Vss
from hvhost.sockets.bridge import SocketBridge
from hvhost.vmbus.channel import Channel, ChannelState

log = logging.getLogger(__name__)

MAXIMUM_EVENTS = 10_000
_MEASURE_SECONDS = 120.0
_TIME_SYNC_SECONDS = 10.0
_LOOK_SECONDS = 0.5
_GONE = (ChannelState.RESCINDED, ChannelState.RELEASED)
_SOCKETS = "sockets"
Family = TypeVar("Family")
_Service = Heartbeat | Shutdown | TimeSync | Kvp | FileCopy | Vss


class Machine:
    """Implements :class:`hvhost.machine.model.LiveMachine`; its loop is the main thread's.

    *board* is that of the first boot, if there is one already; those of later boots, and without
    it the first, are built over what *connect* gives.
    """

    def __init__(
        self,
        config: MachineConfig,
        kernel: KernelImage,
        connect: Callable[[], Transport],
        loop: Loop,
        serial_sinks: list[Callable[[bytes], None]],
        sockets: SocketBridge | None = None,
        board: Board | None = None,
    ) -> None:
        self._config = config
        self._kernel = kernel
        self._connect = connect
        self._loop = loop
        self._serial_sinks = serial_sinks
        self._sockets = sockets
        self._board = board
        self._born = time.monotonic()
        self._state = MachineState.STARTING
        self._events: deque[MachineEvent] = deque(maxlen=MAXIMUM_EVENTS)
        self._sequence = 0
        self._changed = threading.Condition()
        self._boots = 0
        self._crash: CrashReport | None = None
        self._last_stop: str | None = None
        self.error: str | None = None
        self._computer: Computer | None = None
        self._paused_at = 0.0
        self._pausing = threading.Lock()
        self._transport_name = ""
        self._heartbeat = Heartbeat()
        self._shutdown = Shutdown()
        self._timesync = TimeSync(self._read_clocks)
        self._kvp = Kvp(host_items(config.name))
        self._file_copy = FileCopy()
        self._copier = Copier(self._file_copy)
        self.vss = Vss()
        self._switched_off: set[str] = set()
        self._os_id = 0
        self._peripherals: list[Peripheral] = []

    def plug(self, peripherals: list[Peripheral]) -> None:
        """Give the machine device families; before it is powered on."""
        self._peripherals += peripherals

    # --- life; on the loop's thread --------------------------------------------------------------

    def power_on(self) -> None:
        """Build a computer and run it; :class:`HvHostError` when that is not possible."""
        try:
            self._power_on()
        except OSError as error:
            raise not_built(self._config, error) from error

    def _power_on(self) -> None:
        board, self._board = self._board, None
        if board is None:
            board = build_board(self._config, self._kernel, self._connect)
            board.start()
        self._transport_name = board.vm.transport.name
        self._heartbeat = Heartbeat(on_status=self._heartbeat_changed)
        self._shutdown = Shutdown()
        boot = self._boots + 1
        notices = Notices(
            event=self.record,
            crashed=self._crashed,
            power_off=lambda: self._soon(
                boot, lambda: self._stop(MachineState.STOPPED, "the guest powered off")
            ),
            reset=lambda why: self._soon(boot, lambda: self._restart(why)),
            failed=lambda why: self._soon(boot, lambda: self._stop(MachineState.FAILED, why)),
        )
        try:
            self._computer = Computer(
                board,
                self._loop,
                [each for each in self._services if each.offer.name not in self._switched_off],
                self._serial_sinks,
                notices,
            )
        except BaseException:
            board.stop()
            board.close()
            raise
        self._crash = None
        self._os_id = 0
        self._state = MachineState.RUNNING
        self._boots = boot
        self.record("started", f"boot {self._boots}")
        computer = self._computer
        if self._sockets is not None:
            self._sockets.attach(computer.bus, computer.lock)
        for peripheral in self._peripherals:
            peripheral.attach(computer)
        self._loop.call_later(INTERVAL, lambda: self._tick(computer))
        self._computer.start()

    def _soon(self, boot: int, callback: Callable[[], None]) -> None:
        """On the loop's thread, unless the machine has been reset since: that was another life."""
        self._loop.call_soon_threadsafe(lambda: callback() if self._boots == boot else None)

    def _tick(self, computer: Computer) -> None:
        """Every heartbeat interval, for as long as *computer* is ours."""
        if self._computer is not computer:
            return
        self._loop.call_later(INTERVAL, lambda: self._tick(computer))
        now = time.monotonic()
        with computer.lock:
            if computer.paused:
                return  # no time passes
            self._heartbeat.tick(now)
            self._timesync.tick(now)
            self._kvp.tick(now)
            self._file_copy.tick(now)
            self.vss.tick(now)
            for peripheral in self._peripherals:
                peripheral.tick(now)
        computer.tick()

    def _power_down(self) -> None:
        computer, self._computer = self._computer, None
        if self._sockets is not None:
            self._sockets.detach()
        if computer is not None:
            computer.close()
            for peripheral in self._peripherals:
                peripheral.detach()

    def _restart(self, why: str) -> None:
        if self._state in (MachineState.STOPPED, MachineState.FAILED):
            return
        self._power_down()
        self._state = MachineState.STARTING
        self.record("reset", why)
        try:
            self.power_on()
        except HvHostError as error:
            self._stop(MachineState.FAILED, f"the machine could not be reset: {error}")

    def _stop(self, state: MachineState, why: str) -> None:
        if self._state in (MachineState.STOPPED, MachineState.FAILED):
            return
        try:
            self._power_down()
        finally:
            self._state = state
            self._last_stop = why
            if state is MachineState.FAILED:
                self.error = why
                log.error("%s", why)
            self.record("stopped", why)
            self._loop.stop()

    def close(self) -> None:
        """Whatever happened, leave nothing behind; after the loop has ended."""
        self._power_down()
        if self._board is not None:
            self._board.stop()
            self._board.close()
        for peripheral in self._peripherals:
            peripheral.close()

    # --- what happens ----------------------------------------------------------------------------

    def record(self, kind: str, detail: str = "") -> None:
        """Add an event; from any thread."""
        with self._changed:
            self._sequence += 1
            seconds = time.monotonic() - self._born
            self._events.append(MachineEvent(self._sequence, seconds, kind, detail))
            self._changed.notify_all()
        log.info("%s %s", kind, detail)

    def _heartbeat_changed(self, status: HeartbeatStatus) -> None:
        self.record("heartbeat", status.value)

    def _crashed(self, report: CrashReport) -> None:
        self._crash = replace(report, seconds=time.monotonic() - self._born)
        self._state = MachineState.CRASHED
        self.record("crash", report.text or "")
        self._heartbeat.set_crashed(True)

    # --- LiveMachine; any thread -----------------------------------------------------------------

    @property
    def config(self) -> MachineConfig:
        return self._config

    def peripheral(self, kind: type[Family]) -> Family:
        for peripheral in self._peripherals:
            if isinstance(peripheral, kind):
                return peripheral
        raise HvHostError(
            f"machine {self._config.name!r} was started without a {kind.__name__}; "
            "define it with one and start it again."
        )

    def elsewhere(self, family: str) -> Callable[[str, str], str] | None:
        for peripheral in self._peripherals:
            if isinstance(peripheral, PeripheralElsewhere) and peripheral.family == family:
                return peripheral.call
        return None

    def _running(self) -> Computer:
        computer = self._computer
        if computer is None:
            if self._state is MachineState.STARTING:
                raise HvHostError(
                    f"machine {self._config.name!r} is just being started; try again in a moment."
                )
            raise HvHostError(f"machine {self._config.name!r} is not running; start it again.")
        return computer

    def _active(self) -> Computer:
        """The computer, for what needs its guest to run."""
        computer = self._running()
        computer.require_running()
        return computer

    def info(self) -> MachineInfo:
        config, computer = self._config, self._computer
        info = MachineInfo(
            name=config.name,
            pid=os.getpid(),
            state=self._state,
            seconds=time.monotonic() - self._born,
            cpus=config.cpus,
            memory=config.memory,
            kernel=config.kernel,
            command_line=config.command_line,
            transport=self._transport_name,
            boots=self._boots,
            crash=self._crash,
            last_stop=self._last_stop,
            error=self.error,
        )
        if computer is None:
            return info
        if computer.paused:
            info = replace(info, state=MachineState.PAUSED)
        with computer.lock:
            round_trip = self._heartbeat.round_trip
            info = replace(
                info,
                vmbus_version=computer.bus.version,
                heartbeat=self._heartbeat.status(time.monotonic()),
                heartbeat_round_trip_microseconds=round_trip and round_trip * 1e6,
                shutdown_ready=self._shutdown.ready,
                timesync_ready=self._timesync.ready,
                kvp_ready=self._kvp.ready,
                file_copy_ready=self._file_copy.ready,
                channels=tuple(
                    ChannelInfo(
                        channel.channel_id,
                        channel.offer.name,
                        str(channel.offer.interface_type),
                        str(channel.offer.interface_instance),
                        channel.state.value,
                        channel.target_vp,
                    )
                    for channel in computer.bus.channels
                ),
                exits=computer.exits(),
            )
        os_id = self._os_id
        if self._state is MachineState.RUNNING and not os_id:
            with contextlib.suppress(HvHostError):  # just being reset or stopped
                os_id = computer.guest_os_id()
            if self._computer is computer:
                self._os_id = os_id
        return replace(info, guest_os_id=os_id)

    def events(self, after: int, timeout: float) -> list[MachineEvent]:
        with self._changed:
            self._changed.wait_for(lambda: self._sequence > after, timeout)
            return [event for event in self._events if event.sequence > after]

    def shut_down(self, action: ShutdownAction) -> None:
        computer = self._active()
        with computer.lock:
            self._shutdown.request(action)

    def force_stop(self) -> None:
        self._loop.call_soon_threadsafe(
            lambda: self._stop(MachineState.STOPPED, "powered off by force")
        )

    def reset(self) -> None:
        self._running()
        self._soon(self._boots, lambda: self._restart("asked by the user"))

    def pause(self) -> None:
        with self._pausing:
            computer = self._active()
            computer.standstill.begin()
            computer.tick()  # the guest's last words come out
            with computer.lock:
                computer.paused, self._paused_at = True, time.monotonic()
                self._heartbeat.set_paused(True, self._paused_at)
                if self._sockets is not None:
                    self._sockets.pause()
        self.record("paused")

    def resume(self) -> None:
        with self._pausing:
            computer = self._running()
            if not computer.paused:
                raise HvHostError(f"machine {self._config.name!r} is not paused; it runs.")
            seconds = time.monotonic() - self._paused_at
            # Before the guest runs: a shutdown it asks for must not find the machine paused.
            self.record("resumed", f"after {seconds:.1f} s")
            with computer.lock:
                computer.paused = False
                self._heartbeat.set_paused(False, time.monotonic())
                if self._sockets is not None:
                    self._sockets.resume()

            def tell_time() -> None:
                with computer.lock:
                    if self._timesync.ready:
                        self._timesync.sync()

            computer.standstill.end(tell_time)

    def nmi(self) -> None:
        self._running().nmi()

    def hang(self) -> list[ProcessorInfo]:
        computer = self._active()
        computer.hang()
        return computer.where()

    def processors(self) -> list[ProcessorInfo]:
        return self._running().where()

    def heartbeat_round_trips(self, count: int) -> list[float]:
        computer = self._active()
        done = threading.Event()
        result: list[float] = []

        def finished(round_trips: list[float]) -> None:
            result.extend(round_trips)
            done.set()

        with computer.lock:
            self._heartbeat.measure(count, finished)
        deadline = time.monotonic() + _MEASURE_SECONDS
        while not done.wait(_LOOK_SECONDS):
            if time.monotonic() > deadline or self._computer is not computer:
                raise HvHostError("the guest stopped answering heartbeats; see `hvhost info`.")
        return result

    def _read_clocks(self) -> TimeSample:
        return read_clocks(self._running().reference_nanoseconds)

    def time_sync(self) -> float:
        computer = self._active()
        answered = threading.Event()
        result: list[bool] = []

        def done(taken: bool) -> None:
            result.append(taken)
            answered.set()

        started = time.perf_counter()
        with computer.lock:
            self._timesync.sync(done)
        if not answered.wait(_TIME_SYNC_SECONDS):
            raise HvHostError(
                f"the guest did not take the time within {_TIME_SYNC_SECONDS:g} seconds; "
                "see whether it hangs."
            )
        if not result[0]:
            raise HvHostError("the guest refused the time or closed its channel; try again.")
        return time.perf_counter() - started

    def watch_clock(self, address: int, count: int, interval: float) -> list[ClockSample]:
        return watch_clock(self._running().memory, address, count, interval)

    def _exchange(self) -> KvpExchange:
        return KvpExchange(self._kvp, self._active().lock)

    def kvp_list(self, pool: KvpPool | None) -> list[KvpRecord]:
        return self._exchange().items(pool)

    def kvp_get(self, pool: KvpPool | None, key: str) -> KvpRecord:
        return self._exchange().get(pool, key)

    def kvp_set(self, pool: KvpPool, key: str, value: str) -> None:
        self._exchange().set(pool, key, value)

    def kvp_delete(self, pool: KvpPool, key: str) -> None:
        self._exchange().delete(pool, key)

    def ip_settings(self, adapter: str) -> IpSettings:
        return self._exchange().ip_settings(adapter)

    def set_ip(self, settings: IpSettings) -> None:
        self._exchange().set_ip(settings)

    def copy_start(
        self, source: str, destination: str, *, create_path: bool, overwrite: bool
    ) -> CopyProgress:
        if self._file_copy.offer.name in self._switched_off:
            raise HvHostError(
                f"the service file-copy of machine {self._config.name!r} is switched off; "
                f"`hvhost services {self._config.name} --enable file-copy` switches it on."
            )
        return self._copier.start(
            self._active().lock,
            source,
            destination,
            create_path=create_path,
            overwrite=overwrite,
        )

    def copy_progress(self, timeout: float) -> CopyProgress:
        return self._copier.progress(timeout)

    def copy_cancel(self) -> None:
        self._copier.cancel(self._running().lock)

    @property
    def _services(self) -> tuple[_Service, ...]:
        return (
            self._heartbeat,
            self._shutdown,
            self._timesync,
            self._kvp,
            self._file_copy,
            self.vss,
        )

    def services(self) -> list[ServiceInfo]:
        computer = self._running()
        with computer.lock:
            found = []
            for service in self._services:
                channel = _channel_of(computer, service)
                found.append(
                    ServiceInfo(
                        service.offer.name,
                        channel is not None,
                        None if channel is None else channel.state.value,
                        service.ready,
                    )
                )
            if self._sockets is not None:
                connections = len(self._sockets.connections)
                found.append(ServiceInfo(_SOCKETS, self._sockets.enabled, None, connections > 0))
            return found

    def set_service(self, name: str, enabled: bool) -> None:
        computer = self._running()
        with computer.lock:
            if name == _SOCKETS and self._sockets is not None:
                self._sockets.enabled = enabled
                return
            for service in self._services:
                if service.offer.name == name:
                    break
            else:
                names = ", ".join(each.name for each in self.services())
                raise HvHostError(f"There is no service {name!r}; there are {names}.")
            channel = _channel_of(computer, service)
            if enabled:
                self._switched_off.discard(name)
                if channel is None:
                    computer.bus.add_device(service)
            else:
                self._switched_off.add(name)
                if channel is not None:
                    computer.bus.remove_device(channel)

    def serial_input(self, index: int, data: bytes) -> None:
        """Bytes typed at a serial port; what the guest has no room for is lost, as on a wire."""
        computer = self._computer
        if computer is not None and index < len(computer.uarts):
            with computer.lock:
                computer.uarts[index].feed(data)


def _channel_of(computer: Computer, service: _Service) -> Channel | None:
    for channel in computer.bus.channels:
        if channel.device is service and channel.state not in _GONE:
            return channel
    return None
