"""A computer without its bus: memory, processors, chipset, and a kernel ready to run.

Its guest runs by itself until it looks for the bus, which is late in a kernel's start. What is
behind the socket is put together meanwhile, on another processor: :meth:`Board.plug` brings it,
and a processor that wants it earlier waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from hvhost.chipset.acpi import build_acpi_tables
from hvhost.chipset.pm import attach_power_management
from hvhost.chipset.ports import PortBus
from hvhost.chipset.rtc import Rtc
from hvhost.chipset.uart import Uart
from hvhost.errors import HvHostError
from hvhost.firmware.boot_state import BootState
from hvhost.firmware.layout import ACPI_ADDRESS
from hvhost.kvm.transport import OutEvent, Transport
from hvhost.kvm.vcpu import Registers, Segment, Vcpu
from hvhost.kvm.vm import Vm
from hvhost.machine.coalesced import CoalescedPorts
from hvhost.machine.config import MachineConfig
from hvhost.machine.loading import Loading
from hvhost.partition.cpuid import address_bits, build_cpuid
from hvhost.partition.msrs import CRASH_MSR_COUNT, HV_X64_MSR_CRASH_P0
from hvhost.partition.processor import Handlers, Msrs, Processor

RTC_PORTS = range(0x70, 0x72)
# Written before each read of a clock's register, or of PCI's, of which there is none: one exit
# instead of two.
INDEX_PORTS = (range(0x70, 0x71), range(0xCF8, 0xCFC))
SERIAL_PORTS = ((0x3F8, 4), (0x2F8, 3), (0x3E8, 4), (0x2E8, 3))


class Plug(NamedTuple):
    """What a board is plugged into; called on any thread, with the board's lock held."""

    hypercall: Callable[[int, int, int], int]
    """Input value, first and second parameter; its result."""
    synic: Callable[[int, int, int, int], None]
    """VP, SCONTROL, SIEFP, SIMP."""
    msrs: Msrs
    sleep: Callable[[int], None]
    """The number of the S state."""
    reset: Callable[[str], None]
    failed: Callable[[str], None]
    serial: Sequence[Callable[[bytes], None]]
    """What takes the output of each serial port."""


class Board:
    """Built by :meth:`__init__`, running after :meth:`start`.

    :class:`HvHostError` or ``OSError`` when it cannot be built; *transport* is then still the
    caller's.
    """

    def __init__(self, config: MachineConfig, transport: Transport, loading: Loading) -> None:
        self.config = config
        self.lock = threading.RLock()
        self._plug: Plug | None = None
        self._plugged = threading.Condition(self.lock)
        self._closing = self._closed = False
        self.vm = Vm(transport)
        self.layout = layout = loading.layout
        self.memory = loading.memory
        for region in layout.regions:
            self.vm.add_memory(region.guest_address, region.size, region.backing_offset)

        self.ports = PortBus()
        self.ports.register(RTC_PORTS, Rtc(time.time))
        attach_power_management(
            self.ports,
            on_sleep=lambda state: self._socket().sleep(state),
            on_reset=lambda: self._socket().reset("reset register"),
        )
        self._output = [bytearray() for _ in range(config.serial_ports)]
        self.uarts = [self._add_uart(index) for index in range(config.serial_ports)]

        vcpus = [self.vm.create_vcpu(index) for index in range(config.cpus)]
        supported, hyperv = self.vm.supported_cpuid(), self.vm.supported_hyperv_cpuid()
        layout.check_address_width(address_bits(supported))
        for vcpu in vcpus:
            vcpu.set_cpuid(
                build_cpuid(
                    supported,
                    hyperv,
                    vp_index=vcpu.index,
                    processors=config.cpus,
                    extended_hypercalls=True,
                )
            )
        outputs = [range(port, port + 1) for port, _ in SERIAL_PORTS[: len(self.uarts)]]
        self._coalesced = CoalescedPorts(self.vm, [*INDEX_PORTS, *outputs])
        self.vm.filter_msrs(HV_X64_MSR_CRASH_P0, CRASH_MSR_COUNT)
        handlers = Handlers(
            lock=self.lock,
            ports=self.ports,
            msrs=self,
            hypercall=lambda *arguments: self._socket().hypercall(*arguments),
            synic=lambda *arguments: self._socket().synic(*arguments),
            before_port=self.drain_ports,
            stopped=self._stopped,
        )
        self.processors = [Processor(vcpu, handlers) for vcpu in vcpus]
        tables = build_acpi_tables(
            address=ACPI_ADDRESS,
            processors=config.cpus,
            low_mmio=layout.low_mmio,
            high_mmio=layout.high_mmio,
            serial_ports=len(self.uarts),
        )
        assert tables.rsdp_address == loading.rsdp_address
        self.memory.write(ACPI_ADDRESS, tables.blob)
        _set_boot_state(vcpus[0], loading.boot_state())
        transport.code_loaded()

    def _add_uart(self, index: int) -> Uart:
        base, irq = SERIAL_PORTS[index]
        line: OutEvent = self.vm.irq_event(irq)
        # ISA lines are edges to the guest: a rising level is one raise.
        uart = Uart(lambda level: line.trigger() if level else None, partial(self._sent, index))
        self.ports.register(range(base, base + 8), uart)
        return uart

    # --- the socket ----------------------------------------------------------------------------

    def plug(self, plug: Plug) -> None:
        """Bring what the board is plugged into; once, on any thread."""
        with self.lock:
            for sink, output in zip(plug.serial, self._output, strict=True):
                if output:
                    sink(bytes(output))
            self._plug = plug
            self._plugged.notify_all()

    def _sent(self, index: int, data: bytes) -> None:
        """A serial port's output: kept while nobody is there to take it."""
        if self._plug is None:
            self._output[index] += data
        else:
            self._plug.serial[index](data)

    def _socket(self) -> Plug:
        """What was plugged in, after waiting for it; the lock, which is held, is free meanwhile."""
        self._plugged.wait_for(lambda: self._plug is not None or self._closing)
        if self._plug is None:
            raise HvHostError("the machine was stopped while it started; start it again.")
        return self._plug

    def read(self, msr: int) -> int | None:
        """:class:`hvhost.partition.processor.Msrs`."""
        return self._socket().msrs.read(msr)

    def write(self, msr: int, value: int) -> bool:
        """:class:`hvhost.partition.processor.Msrs`."""
        return self._socket().msrs.write(msr, value)

    def _stopped(self, reason: str) -> None:
        """A processor cannot go on; several may stop at once."""
        with self.lock:
            self._plugged.wait_for(lambda: self._plug is not None or self._closing)
            if self._closing:
                return
            assert self._plug is not None
            if reason == "reset":
                self._plug.reset("triple fault")
            else:
                self._plug.failed(reason)

    # --- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Run the guest."""
        for processor in self.processors:
            processor.start()

    def stop(self) -> None:
        """Stop the guest for good; what it wrote last still comes out."""
        if self._closing:
            return
        with self.lock:
            self._closing = True
            self._plugged.notify_all()
        for processor in self.processors:
            processor.stop()
        with self.lock:
            self._flush()

    def close(self) -> None:
        """Give everything back; after :meth:`stop`. Closing twice is closing once."""
        if not self._closed:
            self._closed = True
            self.vm.close()

    def drain_ports(self) -> None:
        """Hand coalesced writes to their devices; with the lock held."""
        self._coalesced.drain(self.ports.write)

    def flush(self) -> None:
        """Now and then: output that the guest left behind without another exit."""
        with self.lock:
            self._coalesced.refresh()
            self._flush()

    def _flush(self) -> None:
        self.drain_ports()
        for uart in self.uarts:
            uart.flush()


def _set_boot_state(vcpu: Vcpu, boot: BootState) -> None:
    special = vcpu.special_registers()

    def segment(wanted: object) -> Segment:
        names = ("base", "limit", "selector", "type", "present", "dpl", "db", "s", "l", "g")
        return Segment(**{name: getattr(wanted, name) for name in names})

    data = segment(boot.data)
    vcpu.set_special_registers(
        special.with_segments(
            cs=segment(boot.code),
            ds=data,
            es=data,
            fs=data,
            gs=data,
            ss=data,
            tr=segment(boot.task),
        )._replace(
            gdt=(boot.gdt_address, boot.gdt_limit),
            cr0=boot.cr0,
            cr3=boot.cr3,
            cr4=boot.cr4,
            efer=boot.efer,
        )
    )
    vcpu.set_registers(
        Registers(rip=boot.rip, rsp=boot.rsp, rsi=boot.rsi, rbx=boot.rbx, rflags=boot.rflags)
    )
