from __future__ import annotations

import shutil
import struct
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from hvhost.chipset.acpi import SERIAL_PORTS, AcpiTables, build_acpi_tables, build_dsdt
from hvhost.errors import LocalProtocolError
from hvhost.firmware.layout import ACPI_ADDRESS, ACPI_SIZE, memory_layout

LOW, HIGH = range(0xF8000000, 0xFEC00000), range(0xFE0000000, 0x1000000000)
needs_iasl = pytest.mark.skipif(
    shutil.which("iasl") is None, reason="iasl is not installed (package acpica-tools)"
)


def build(
    processors: int = 2, *, high_mmio: range = HIGH, serial_ports: int = 2, allow_s4: bool = False
) -> AcpiTables:
    return build_acpi_tables(
        address=ACPI_ADDRESS,
        processors=processors,
        low_mmio=LOW,
        high_mmio=high_mmio,
        serial_ports=serial_ports,
        allow_s4=allow_s4,
    )


def at(tables: AcpiTables, address: int) -> bytes:
    """The table at a guest address, whole; checks that it lies inside and sums to 0."""
    offset = address - ACPI_ADDRESS
    assert 0 < offset < len(tables.blob) - 8
    length = struct.unpack_from("<I", tables.blob, offset + 4)[0]
    table = tables.blob[offset : offset + length]
    assert len(table) == length
    if table[:4] != b"FACS":
        assert sum(table) & 0xFF == 0
    return table


def find(tables: AcpiTables, signature: bytes) -> bytes:
    xsdt = at(tables, struct.unpack_from("<Q", tables.blob, 24)[0])
    assert xsdt[:4] == b"XSDT"
    entries = [at(tables, address) for (address,) in struct.iter_unpack("<Q", xsdt[36:])]
    return next(table for table in entries if table[:4] == signature)


def madt_entries(table: bytes) -> list[bytes]:
    entries, offset = [], 44
    while offset < len(table):
        length = table[offset + 1]
        assert length >= 2
        entries.append(table[offset : offset + length])
        offset += length
    assert offset == len(table)
    return entries


def test_rsdp() -> None:
    tables = build()
    rsdp = tables.blob[:36]
    assert tables.rsdp_address == ACPI_ADDRESS
    assert rsdp[:8] == b"RSD PTR "
    assert rsdp[15] == 2
    assert sum(rsdp[:20]) & 0xFF == 0
    assert sum(rsdp) & 0xFF == 0


def test_fadt() -> None:
    tables = build()
    fadt = find(tables, b"FACP")
    assert len(fadt) == 276
    facs, dsdt = struct.unpack_from("<II", fadt, 36)
    assert facs % 64 == 0
    assert at(tables, facs)[:4] == b"FACS"
    assert len(at(tables, facs)) == 64
    assert at(tables, dsdt)[:4] == b"DSDT"
    assert struct.unpack_from("<Q", fadt, 140)[0] == dsdt
    assert struct.unpack_from("<H", fadt, 46)[0] == 9
    assert struct.unpack_from("<I", fadt, 48)[0] == 0  # no SMI command port
    assert struct.unpack_from("<4I", fadt, 56) == (0x600, 0, 0x604, 0)
    assert struct.unpack_from("<I", fadt, 76)[0] == 0  # no PM timer
    assert fadt[88:92] == bytes([4, 2, 0, 0])
    assert fadt[108] == 0x32
    boot_architecture = struct.unpack_from("<H", fadt, 109)[0]
    assert boot_architecture & 0b100011 == 0b000001  # legacy devices, no 8042, an RTC
    flags = struct.unpack_from("<I", fadt, 112)[0]
    assert flags & 1 << 10
    assert not flags & (1 << 8 | 1 << 20)  # no 32-bit timer, not hardware-reduced
    assert fadt[116:129] == bytes([1, 8, 0, 1]) + struct.pack("<Q", 0xCF9) + b"\x06"
    assert fadt[148:160] == bytes([1, 32, 0, 3]) + struct.pack("<Q", 0x600)
    assert fadt[172:184] == bytes([1, 16, 0, 2]) + struct.pack("<Q", 0x604)


def test_pm_base_moves_both_blocks() -> None:
    tables = build_acpi_tables(
        address=ACPI_ADDRESS, processors=1, low_mmio=LOW, serial_ports=0, pm_base=0x400
    )
    fadt = find(tables, b"FACP")
    assert struct.unpack_from("<4I", fadt, 56) == (0x400, 0, 0x404, 0)
    assert struct.unpack_from("<Q", fadt, 152)[0] == 0x400


@pytest.mark.parametrize("processors", [1, 2, 64, 255, 256, 1024])
def test_madt_names_every_processor_once(processors: int) -> None:
    tables = build(processors)
    assert len(tables.blob) <= ACPI_SIZE
    entries = madt_entries(find(tables, b"APIC"))
    ids = [struct.unpack("<BBBBI", e)[3] for e in entries if e[0] == 0]
    ids += [struct.unpack("<BBHIII", e)[3] for e in entries if e[0] == 9]
    assert ids == list(range(processors))
    assert max(struct.unpack("<BBBBI", e)[3] for e in entries if e[0] == 0) < 255
    io_apics = [struct.unpack("<BBBBII", e) for e in entries if e[0] == 1]
    assert io_apics == [(1, 12, processors & 0xFF, 0, 0xFEC00000, 0)]
    overrides = [struct.unpack("<BBBBIH", e) for e in entries if e[0] == 2]
    assert overrides == [(2, 10, 0, 9, 9, 0x0D)]
    assert [struct.unpack("<BBBHB", e) for e in entries if e[0] == 4] == [(4, 6, 0xFF, 0, 1)]
    assert len([e for e in entries if e[0] == 10]) == (processors > 255)


def test_tables_do_not_overlap() -> None:
    tables = build(300)
    fadt = find(tables, b"FACP")
    xsdt_address = struct.unpack_from("<Q", tables.blob, 24)[0]
    addresses = [ACPI_ADDRESS, xsdt_address, *struct.unpack_from("<II", fadt, 36)]
    xsdt = at(tables, xsdt_address)
    addresses += [address for (address,) in struct.iter_unpack("<Q", xsdt[36:])]
    spans = sorted(
        (address, address + (36 if address == ACPI_ADDRESS else len(at(tables, address))))
        for address in addresses
    )
    assert all(first[1] <= second[0] for first, second in pairwise(spans))


def test_dsdt_has_s4_only_when_asked() -> None:
    assert b"_S5_" in build_dsdt(LOW, HIGH, serial_ports=1)
    assert b"_S4_" not in build_dsdt(LOW, HIGH, serial_ports=1)
    assert b"_S4_" in build_dsdt(LOW, HIGH, serial_ports=1, allow_s4=True)
    assert b"_S4_" in build(allow_s4=True).blob


@pytest.mark.parametrize("count", [-1, 5])
def test_serial_port_count(count: int) -> None:
    with pytest.raises(LocalProtocolError):
        build(serial_ports=count)


@pytest.mark.parametrize("address", [0, 0xE0020, 1 << 32])
def test_bad_address(address: int) -> None:
    with pytest.raises(LocalProtocolError):
        build_acpi_tables(address=address, processors=1, low_mmio=LOW)


def disassemble(path: Path) -> str:
    result = subprocess.run(
        ["iasl", "-d", path.name], cwd=path.parent, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return path.with_suffix(".dsl").read_text()


@needs_iasl
def test_iasl_reads_what_was_meant(tmp_path: Path) -> None:
    path = tmp_path / "dsdt.aml"
    path.write_bytes(build_dsdt(LOW, HIGH, serial_ports=4, allow_s4=True))
    # Comments and white space are iasl's own business.
    lines = [line.split("//")[0].split("/*")[0].strip() for line in disassemble(path).splitlines()]
    text = " ".join(" ".join(lines).split())
    assert 'Device (VMOD) { Name (_HID, "ACPI0004" ' in text
    assert "ResourceProducer, PosDecode, MinFixed, MaxFixed, Cacheable, ReadWrite" in text
    for number in ("0xF8000000", "0xFEBFFFFF", "0x06C00000"):
        assert number in text
    for number in ("0x0000000FE0000000", "0x0000000FFFFFFFFF", "0x0000000020000000"):
        assert number in text
    assert 'Device (VMBS) { Name (_HID, "VMBus") Name (_CID, "VMBUS")' in text
    for index, (first, irq) in enumerate(SERIAL_PORTS):
        com = text[text.index(f"Device (COM{index + 1})") :]
        com = com[: com.index("})")]
        assert 'EisaId ("PNP0501"' in com
        assert com.count(f"0x{first:04X},") == 2
        assert f"IRQNoFlags () {{{irq}}}" in com
    assert 'EisaId ("PNP0B00"' in text
    assert r"Name (\_S5, Package (0x04) { 0x05, 0x05, Zero, Zero })" in text


@needs_iasl
@pytest.mark.parametrize("serial_ports", [0, 4])
def test_iasl_makes_the_same_bytes_from_its_disassembly(tmp_path: Path, serial_ports: int) -> None:
    table = build_dsdt(LOW, HIGH, serial_ports=serial_ports)
    path = tmp_path / "dsdt.aml"
    path.write_bytes(table)
    disassemble(path)
    # -f: iasl holds the lower-case _HID "VMBus" for an error; -oa: it would shorten names.
    command = ["iasl", "-f", "-oa", "-p", "again", "dsdt.dsl"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert (tmp_path / "again.aml").read_bytes()[36:] == table[36:]


@needs_iasl
@pytest.mark.parametrize("signature", [b"FACP", b"APIC"])
def test_iasl_finds_nothing_wrong(tmp_path: Path, signature: bytes) -> None:
    path = tmp_path / "table.aml"
    path.write_bytes(find(build(300), signature))
    text = disassemble(path)
    assert "Invalid" not in text
    assert "Error" not in text
    assert "Warning" not in text


def test_windows_of_a_machine_are_described() -> None:
    layout = memory_layout(512 << 20)
    blob = build_dsdt(layout.low_mmio, layout.high_mmio, serial_ports=1)
    assert struct.pack("<II", layout.low_mmio.start, layout.low_mmio.stop - 1) in blob
    assert struct.pack("<QQ", layout.high_mmio.start, layout.high_mmio.stop - 1) in blob
    assert b"\x8a\x2b" not in build_dsdt(layout.low_mmio, range(0), serial_ports=1)
