"""The ACPI tables of a machine: RSDP, XSDT, FADT, FACS, MADT and a DSDT of our own writing.

Source: ACPI specification 6.5, 5.2. What guests need of them:

* Linux finds VMBus by an ACPI device whose ``_HID`` is ``VMBUS`` or ``VMBus`` and takes its MMIO
  windows from the ``_CRS`` of an ancestor (``drivers/hv/vmbus_drv.c``, ``vmbus_acpi_add``).
* FreeBSD looks for ``VMBUS`` among ``_HID`` and ``_CID``, below an ``ACPI0004`` container.
* An i8042 that is announced but absent, or PM1 enable bits that do not read back, cost seconds.
* ``\\_S4`` makes Linux refuse memory ballooning and hot-add, so it is there only when asked for.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from hvhost.chipset import aml, pm, rtc
from hvhost.errors import LocalProtocolError

LOCAL_APIC_ADDRESS = 0xFEE00000
IO_APIC_ADDRESS = 0xFEC00000
SCI = 9
# COM1 to COM4: first port and ISA interrupt line.
SERIAL_PORTS = ((0x3F8, 4), (0x2F8, 3), (0x3E8, 4), (0x2E8, 3))
SERIAL_PORT_LENGTH = 8
# Where Hyper-V's own tables put the bus; guests take their interrupts from the SynIC instead.
VMBUS_IRQ = 5

_OEM_ID, _OEM_TABLE_ID, _CREATOR_ID = b"HVHOST", b"HVHOST  ", b"HVHO"

# FADT fixed feature flags (table 5.10) and IA-PC boot architecture flags (table 5.11).
FADT_WBINVD, FADT_PROC_C1, FADT_PWR_BUTTON, FADT_SLP_BUTTON = 1 << 0, 1 << 2, 1 << 4, 1 << 5
FADT_FIX_RTC, FADT_RESET_REG_SUP = 1 << 6, 1 << 10
IAPC_LEGACY_DEVICES, IAPC_8042, IAPC_VGA_NOT_PRESENT = 1 << 0, 1 << 1, 1 << 2
_SYSTEM_IO = 1


class AcpiTables(NamedTuple):
    """*blob* goes to the guest address the tables were built for; both addresses in bytes."""

    rsdp_address: int
    blob: bytes


def build_acpi_tables(
    *,
    address: int,
    processors: int,
    low_mmio: range,
    high_mmio: range = range(0),
    serial_ports: int = 2,
    allow_s4: bool = False,
    pm_base: int = pm.PM_BASE,
) -> AcpiTables:
    """All tables, to be placed at guest *address* (a multiple of 64 below 4 GiB), RSDP first.

    *low_mmio* and *high_mmio* are the windows VMBus may hand out, as ranges of byte addresses;
    an empty one is left out. *serial_ports* is 0 to 4. APIC ids are the VP indices.
    """
    if address % 64 or not 0 < address < 1 << 32:
        raise LocalProtocolError(f"ACPI tables cannot lie at {address:#x}; align them to 64.")
    blob = bytearray(64)

    def place(table: bytes) -> int:
        """Append at a multiple of 64 (which FACS demands) and give the guest address."""
        blob.extend(bytes(-len(blob) % 64))
        blob.extend(table)
        return address + len(blob) - len(table)

    dsdt = place(build_dsdt(low_mmio, high_mmio, serial_ports=serial_ports, allow_s4=allow_s4))
    facs = place(struct.pack("<4sIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 2))
    fadt = place(_fadt(dsdt=dsdt, facs=facs, pm_base=pm_base))
    madt = place(_madt(processors))
    xsdt = place(_table(b"XSDT", 1, struct.pack("<QQ", fadt, madt)))
    blob[:36] = _rsdp(xsdt)
    return AcpiTables(address, bytes(blob))


def _checksum(data: bytes | bytearray) -> int:
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    header = struct.pack(
        "<4sIBB6s8sI4sI",
        signature,
        36 + len(body),
        revision,
        0,
        _OEM_ID,
        _OEM_TABLE_ID,
        1,
        _CREATOR_ID,
        1,
    )
    table = bytearray(header + body)
    table[9] = _checksum(table)
    return bytes(table)


def _rsdp(xsdt: int) -> bytes:
    rsdp = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM_ID, 2, 0, 36, xsdt, 0))
    rsdp[8] = _checksum(rsdp[:20])
    rsdp[32] = _checksum(rsdp)
    return bytes(rsdp)


def _generic_address(port: int, size: int) -> bytes:
    """A generic address structure for a port of *size* bytes (5.2.3.2)."""
    access = {1: 1, 2: 2, 4: 3}[size]
    return struct.pack("<BBBBQ", _SYSTEM_IO, 8 * size, 0, access, port)


def _fadt(*, dsdt: int, facs: int, pm_base: int) -> bytes:
    table = bytearray(276)

    def put(offset: int, layout: str, *values: int) -> None:
        struct.pack_into("<" + layout, table, offset, *values)

    put(36, "II", facs, dsdt)
    put(46, "H", SCI)
    put(56, "I", pm_base)
    put(64, "I", pm_base + pm.PM1_CONTROL_OFFSET)
    put(88, "BB", pm.PM1_EVENT_LENGTH, pm.PM1_CONTROL_LENGTH)
    put(96, "HH", 0xFFFF, 0xFFFF)  # C2 and C3 latencies: not supported
    put(108, "B", rtc.CENTURY)
    put(109, "H", IAPC_LEGACY_DEVICES | IAPC_VGA_NOT_PRESENT)
    flags = FADT_WBINVD | FADT_PROC_C1 | FADT_PWR_BUTTON | FADT_SLP_BUTTON
    put(112, "I", flags | FADT_FIX_RTC | FADT_RESET_REG_SUP)
    table[116:128] = _generic_address(pm.RESET_PORT, 1)
    put(128, "B", pm.RESET_VALUE)
    put(131, "B", 5)  # minor version
    put(140, "Q", dsdt)
    # The event block is one register of 32 bits: status and enable.
    table[148:160] = _generic_address(pm_base, 4)
    table[172:184] = _generic_address(pm_base + pm.PM1_CONTROL_OFFSET, 2)
    return _table(b"FACP", 6, bytes(table[36:]))


def _madt(processors: int) -> bytes:
    body = bytearray(struct.pack("<II", LOCAL_APIC_ADDRESS, 1))  # there are 8259s as well
    for index in range(processors):
        if index < 255:  # local APIC id 255 is the broadcast
            body += struct.pack("<BBBBI", 0, 8, index, index, 1)
        else:
            body += struct.pack("<BBHIII", 9, 16, 0, index, 1, index)
    body += struct.pack("<BBBBII", 1, 12, processors & 0xFF, 0, IO_APIC_ADDRESS, 0)
    body += struct.pack("<BBBBIH", 2, 10, 0, SCI, SCI, 0x0D)  # active high, level
    body += struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1)  # every processor's LINT1 is NMI
    if processors > 255:
        body += struct.pack("<BBHIB3x", 10, 12, 0, 0xFFFFFFFF, 1)
    return _table(b"APIC", 4, bytes(body))


def build_dsdt(
    low_mmio: range, high_mmio: range, *, serial_ports: int, allow_s4: bool = False
) -> bytes:
    """The DSDT with its header; arguments as in :func:`build_acpi_tables`."""
    if not 0 <= serial_ports <= len(SERIAL_PORTS):
        raise LocalProtocolError(f"a PC has up to 4 serial ports, not {serial_ports}.")
    windows = []
    if low_mmio:
        windows.append(aml.dword_memory(low_mmio, producer=True))
    if high_mmio:
        windows.append(aml.qword_memory(high_mmio, producer=True))
    bus = aml.device(
        "VMBS",
        aml.name("_HID", aml.string("VMBus")),
        aml.name("_CID", aml.string("VMBUS")),
        aml.name("_DDN", aml.string("VMBUS")),
        aml.name("_UID", aml.integer(0)),
        aml.method("_STA", aml.return_(aml.integer(0x0F))),
        aml.name("_CRS", aml.resource_template(aml.irq_no_flags(VMBUS_IRQ))),
    )
    container = aml.device(
        "VMOD",
        aml.name("_HID", aml.string("ACPI0004")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", aml.resource_template(*windows)),
        bus,
    )
    clock = aml.device(
        "RTC_",
        aml.name("_HID", aml.eisa_id("PNP0B00")),
        aml.name("_CRS", aml.resource_template(aml.io(rtc.INDEX_PORT, 2))),
    )
    body = aml.name("\\_S5", _sleep_package(5))
    if allow_s4:
        body += aml.name("\\_S4", _sleep_package(4))
    body += aml.scope("\\_SB", container, *map(_serial_port, range(serial_ports)), clock)
    return _table(b"DSDT", 2, body)


def _sleep_package(state: int) -> bytes:
    """SLP_TYP for PM1a and PM1b; ours is the number of the S state."""
    return aml.package(*map(aml.integer, (state, state, 0, 0)))


def _serial_port(index: int) -> bytes:
    first, line = SERIAL_PORTS[index]
    resources = aml.resource_template(aml.io(first, SERIAL_PORT_LENGTH), aml.irq_no_flags(line))
    return aml.device(
        f"COM{index + 1}",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.integer(index + 1)),
        aml.name("_CRS", resources),
    )
