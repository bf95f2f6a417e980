"""Who a logical unit is: INQUIRY and its vital product data pages.

Source: SPC-4 6.4 and 7.8, SBC-3 6.6. Vendor and product are those of Hyper-V's own disks: Linux's
driver treats units of vendor ``Msft`` as such.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final
from uuid import UUID

from hvhost.storage.scsi import INVALID_FIELD_IN_CDB, CheckCondition

VENDOR: Final = b"Msft    "
REVISION: Final = b"1.0 "
_SPC_4 = 0x06
_RESPONSE_FORMAT = 0x02
_COMMAND_QUEUING = 0x02
_REMOVABLE = 0x80
#: Peripheral qualifier and device type of a unit that is not there (SPC-4 6.4.2).
NO_DEVICE: Final = 0x7F
#: What follows the 36 bytes (SPC-4 6.4.2); version descriptors of SAM-5, SPC-4, SBC-3.
_REST = bytes(22) + struct.pack(">8H", 0x00A0, 0x0460, 0x04C0, 0, 0, 0, 0, 0)
#: Microsoft's company identifier of 24 bits behind NAA 6, as Hyper-V's disks have it.
_NAA_6_MICROSOFT = 0x6002248
_NON_ROTATING = 1
_THIN_PROVISIONED = 2
#: Limits of one command, in bytes.
MAXIMUM_TRANSFER: Final = 2 << 20
MAXIMUM_WRITE_SAME: Final = 64 << 20
MAXIMUM_UNMAP_DESCRIPTORS: Final = 256


class DeviceType(IntEnum):
    """Peripheral device type."""

    DISK = 0x00
    CD_DVD = 0x05


class VpdPage(IntEnum):
    """Vital product data pages."""

    SUPPORTED_PAGES = 0x00
    UNIT_SERIAL_NUMBER = 0x80
    DEVICE_IDENTIFICATION = 0x83
    BLOCK_LIMITS = 0xB0
    BLOCK_DEVICE_CHARACTERISTICS = 0xB1
    LOGICAL_BLOCK_PROVISIONING = 0xB2


@dataclass(frozen=True, slots=True)
class Identity:
    """What a unit says of itself; sizes in bytes. ``can_unmap``: storage can be given back."""

    device_type: DeviceType
    product: bytes
    identifier: UUID
    logical_sector_size: int = 512
    physical_sector_size: int = 512
    can_unmap: bool = False

    @property
    def naa(self) -> bytes:
        """The 16 bytes that name the unit all over the world (NAA IEEE Registered Extended)."""
        unique = self.identifier.int & (1 << 100) - 1
        return (_NAA_6_MICROSOFT << 100 | unique).to_bytes(16, "big")

    @property
    def serial_number(self) -> str:
        """32 hexadecimal digits."""
        return self.identifier.hex


def standard(identity: Identity) -> bytes:
    """Standard INQUIRY data."""
    removable = _REMOVABLE if identity.device_type is DeviceType.CD_DVD else 0
    return _standard(identity.device_type, removable, identity.product.ljust(16)[:16])


def absent() -> bytes:
    """Standard INQUIRY data of a logical unit that is not there.

    The least that SPC-4 allows: Linux asks all 1,024 places of a fibre channel adapter, and each
    again if there is more.
    """
    return _standard(NO_DEVICE, 0, bytes(16), rest=b"")


def _standard(peripheral: int, removable: int, product: bytes, rest: bytes = _REST) -> bytes:
    head = struct.pack(
        ">8B", peripheral, removable, _SPC_4, _RESPONSE_FORMAT, 0, 0, 0, _COMMAND_QUEUING
    )
    data = head + VENDOR + product + REVISION + rest
    return data[:4] + bytes((len(data) - 5,)) + data[5:]


def inquiry(identity: Identity, cdb: bytes) -> bytes:
    """The answer to an INQUIRY command; :class:`CheckCondition` for a page that is not there."""
    vital, page = cdb[1] & 1, cdb[2]
    if not vital:
        if page:
            raise CheckCondition(INVALID_FIELD_IN_CDB)
        return standard(identity)
    pages = _pages(identity)
    if page not in pages:
        raise CheckCondition(INVALID_FIELD_IN_CDB)
    content = pages[page]
    return struct.pack(">BBH", identity.device_type, page, len(content)) + content


def allocation_length(cdb: bytes) -> int:
    """Bytes that the guest asked for."""
    return int.from_bytes(cdb[3:5], "big")


def _pages(identity: Identity) -> dict[int, bytes]:
    pages: dict[int, bytes] = {
        VpdPage.UNIT_SERIAL_NUMBER: identity.serial_number.encode("ascii"),
        VpdPage.DEVICE_IDENTIFICATION: _identification(identity),
    }
    if identity.device_type is DeviceType.DISK:
        pages[VpdPage.BLOCK_LIMITS] = _block_limits(identity)
        pages[VpdPage.BLOCK_DEVICE_CHARACTERISTICS] = struct.pack(">H", _NON_ROTATING).ljust(
            60, b"\0"
        )
        pages[VpdPage.LOGICAL_BLOCK_PROVISIONING] = _provisioning(identity)
    return {VpdPage.SUPPORTED_PAGES: bytes((0, *pages)), **pages}


def _identification(identity: Identity) -> bytes:
    """NAA, and vendor with serial number, both of the logical unit (SPC-4 7.8.6)."""
    vendor = VENDOR + identity.serial_number.encode("ascii")
    return b"".join(
        struct.pack(">BBBB", code_set, designator, 0, len(content)) + content
        for code_set, designator, content in ((1, 3, identity.naa), (2, 1, vendor))
    )


def _block_limits(identity: Identity) -> bytes:
    """SBC-3 6.6.3. WRITE SAME of no blocks is refused (WSNZ)."""
    block = identity.logical_sector_size
    unmap = identity.can_unmap
    return struct.pack(
        ">BBHIIIIIIIQ20x",
        1,
        0,
        identity.physical_sector_size // block,
        MAXIMUM_TRANSFER // block,
        0,
        0,
        0xFFFFFFFF if unmap else 0,
        MAXIMUM_UNMAP_DESCRIPTORS if unmap else 0,
        identity.physical_sector_size // block if unmap else 0,
        1 << 31 if unmap else 0,  # alignment 0 is valid
        MAXIMUM_WRITE_SAME // block,
    )


def _provisioning(identity: Identity) -> bytes:
    """SBC-3 6.6.4: UNMAP and both WRITE SAME unmap, and what is unmapped reads as zeros."""
    if not identity.can_unmap:
        return bytes(4)
    return struct.pack(">BBBB", 0, 0xE4, _THIN_PROVISIONED, 0)
