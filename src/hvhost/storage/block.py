"""A disk as a SCSI logical unit: SBC-3 commands on a :class:`hvhost.storage.disk.Disk`.

Order and durability, as the guest sees them: commands of a unit take effect one after the other in
the order in which they were sent on a channel. A write that was answered with GOOD is seen by every
later read. It survives the death of this process and a loss of power of the host once a SYNCHRONIZE
CACHE sent after its answer was answered, or at once if it carried FUA or the guest turned the write
cache off (caching mode page). The death of this process alone it survives at once, unless it went
to a block that a dynamic or differencing image did not have before.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from hvhost.storage import inquiry, mode, scsi
from hvhost.storage.buffers import only_zeros, section, total
from hvhost.storage.disk import Disk
from hvhost.storage.inquiry import DeviceType, Identity
from hvhost.storage.mode import ModeParameters
from hvhost.storage.scsi import CheckCondition, OpCode
from hvhost.storage.unit import UnitState, request_sense

PRODUCT = b"Virtual Disk"
_FUA = 0x08
_PROTECT = 0xE0
_BYTE_CHECK = 0x06
_WRITE_SAME_UNMAP = 0x08
_WRITE_SAME_NO_DATA = 0x01
_WRITE_SAME_ANCHOR = 0x10
_STEP_BYTES = 1 << 20
_EJECT, _START = 0x02, 0x01
Data = Sequence[memoryview]


class DiskUnit:
    """*disk* for a guest; :class:`hvhost.storage.unit.LogicalUnit`."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.state = UnitState()
        self.identity = Identity(
            DeviceType.DISK,
            PRODUCT,
            disk.identifier,
            disk.logical_sector_size,
            disk.physical_sector_size,
            can_unmap=not disk.read_only,
        )
        self._sector = disk.logical_sector_size
        self._commands: dict[int, Callable[[bytes, Data], int]] = {
            **dict.fromkeys(
                (OpCode.READ_6, OpCode.READ_10, OpCode.READ_12, OpCode.READ_16), self._read
            ),
            **dict.fromkeys(
                (
                    *(OpCode.WRITE_6, OpCode.WRITE_10, OpCode.WRITE_12, OpCode.WRITE_16),
                    *(OpCode.WRITE_VERIFY, OpCode.WRITE_VERIFY_12, OpCode.WRITE_VERIFY_16),
                ),
                self._write,
            ),
            OpCode.SYNCHRONIZE_CACHE: self._synchronize,
            OpCode.SYNCHRONIZE_CACHE_16: self._synchronize,
            OpCode.VERIFY: self._verify,
            OpCode.VERIFY_12: self._verify,
            OpCode.VERIFY_16: self._verify,
            OpCode.WRITE_SAME: self._write_same,
            OpCode.WRITE_SAME_16: self._write_same,
            OpCode.UNMAP: self._unmap,
            OpCode.TEST_UNIT_READY: lambda cdb, data: 0,
            OpCode.START_STOP: self._start_stop,
            OpCode.ALLOW_MEDIUM_REMOVAL: lambda cdb, data: 0,
            OpCode.REQUEST_SENSE: lambda cdb, data: request_sense(cdb, data, self.state),
            OpCode.INQUIRY: self._inquiry,
            OpCode.MODE_SENSE: self._mode_sense,
            OpCode.MODE_SENSE_10: self._mode_sense,
            OpCode.MODE_SELECT: self._mode_select,
            OpCode.MODE_SELECT_10: self._mode_select,
            OpCode.READ_CAPACITY: self._read_capacity,
            OpCode.SERVICE_ACTION_IN_16: self._service_action_in,
        }

    def execute(self, cdb: bytes, data: Data) -> int:
        command = self._commands.get(cdb[0])
        if command is None:
            raise CheckCondition(scsi.INVALID_COMMAND)
        attentions = self.state.attentions
        if attentions and cdb[0] not in scsi.ANSWERED_ALWAYS:
            raise CheckCondition(attentions.pop(0))
        return command(cdb, data)

    def close(self) -> None:
        self.disk.close()

    def capacity_changed(self) -> None:
        """The disk was resized; have the guest told."""
        self.state.attend(scsi.CAPACITY_CHANGED)

    @property
    def _blocks(self) -> int:
        return self.disk.size // self._sector

    def _range(self, lba: int, blocks: int) -> tuple[int, int]:
        """Offset and length in bytes of blocks that are on the disk."""
        sector = self._sector
        offset, length = lba * sector, blocks * sector
        if offset + length > self.disk.size:
            raise CheckCondition(scsi.LBA_OUT_OF_RANGE)
        return offset, length

    def _extent(self, cdb: bytes, data: Data) -> tuple[int, int, Data, int]:
        """Offset and length of what is moved, the buffers for just that much, and the flags."""
        lba, blocks, flags = scsi.parse_extent(cdb)
        if flags & _PROTECT:
            raise CheckCondition(scsi.INVALID_FIELD_IN_CDB)
        offset, length = self._range(lba, blocks)
        there = total(data)
        if there != length:
            if there < length:
                raise CheckCondition(scsi.INVALID_FIELD_IN_CDB)
            data = section(data, 0, length)
        return offset, length, data, flags

    def _check_writable(self) -> None:
        if self.disk.read_only:
            raise CheckCondition(scsi.WRITE_PROTECTED)

    def _read(self, cdb: bytes, data: Data) -> int:
        offset, length, data, _ = self._extent(cdb, data)
        if length:
            self.disk.readv(offset, data)
        return length

    def _write(self, cdb: bytes, data: Data) -> int:
        offset, length, data, flags = self._extent(cdb, data)
        self._check_writable()
        if length:
            self.disk.writev(offset, data)
            if flags & _FUA or not self.state.write_cache:
                self.disk.flush()
        return length

    def _synchronize(self, cdb: bytes, data: Data) -> int:
        lba, blocks, _ = scsi.parse_extent(cdb)
        self._range(lba, blocks)
        self.disk.flush()
        return 0

    def _verify(self, cdb: bytes, data: Data) -> int:
        lba, blocks, flags = scsi.parse_extent(cdb)
        offset, length = self._range(lba, blocks)
        check = flags & _BYTE_CHECK
        if flags & _PROTECT or check not in (0, 2):
            raise CheckCondition(scsi.INVALID_FIELD_IN_CDB)
        if not check:
            self._read_through(offset, length)
            return 0
        if not length:
            return 0
        if length > inquiry.MAXIMUM_TRANSFER:
            raise CheckCondition(scsi.INVALID_FIELD_IN_CDB)
        theirs = scsi.take(data, length)
        ours = bytearray(length)
        self.disk.readv(offset, [memoryview(ours)])
        if ours != theirs:
            raise CheckCondition(scsi.MISCOMPARE)
        return length

    def _read_through(self, offset: int, length: int) -> None:
        """Have the medium's errors come up, as far as one command may keep the others waiting."""
        if length > inquiry.MAXIMUM_WRITE_SAME:
            raise CheckCondition(scsi.INVALID_FIELD_IN_CDB)
        room = memoryview(bytearray(min(length, _STEP_BYTES)))
        for start in range(0, length, _STEP_BYTES):
            self.disk.readv(offset + start, [room[: length - start]])

    def _write_same(self, cdb: bytes, data: Data) -> int:
        lba, blocks, flags = scsi.parse_extent(cdb)
        no_data = cdb[0] == OpCode.WRITE_SAME_16 and flags & _WRITE_SAME_NO_DATA
        limit = inquiry.MAXIMUM_WRITE_SAME // self._sector
        if flags & (_PROTECT | _WRITE_SAME_ANCHOR) or not 0 < blocks <= limit:
            raise CheckCondition(scsi.INVALID_FIELD_IN_CDB)
        offset, length = self._range(lba, blocks)
        block = bytes(self._sector) if no_data else scsi.take(data, self._sector)
        self._check_writable()
        if flags & _WRITE_SAME_UNMAP and only_zeros(block):
            self.disk.unmap(offset, length)
        else:
            pattern = memoryview(block * (min(length, _STEP_BYTES) // self._sector))
            for start in range(0, length, len(pattern)):
                self.disk.writev(offset + start, [pattern[: length - start]])
        if not self.state.write_cache:
            self.disk.flush()
        return 0 if no_data else self._sector

    def _unmap(self, cdb: bytes, data: Data) -> int:
        length = int.from_bytes(cdb[7:9], "big")
        if cdb[1] & 1:  # to anchor what is unmapped
            raise CheckCondition(scsi.INVALID_FIELD_IN_CDB)
        if not length:
            return 0
        descriptors = scsi.parse_unmap(scsi.take(data, length))
        if len(descriptors) > inquiry.MAXIMUM_UNMAP_DESCRIPTORS:
            raise CheckCondition(scsi.INVALID_FIELD_IN_PARAMETERS)
        ranges = [self._range(lba, blocks) for lba, blocks in descriptors]
        self._check_writable()
        for offset, count in ranges:
            if count:
                self.disk.unmap(offset, count)
        if not self.state.write_cache:
            self.disk.flush()
        return length

    def _start_stop(self, cdb: bytes, data: Data) -> int:
        """Nothing spins; a stop writes the cache back, and there is no tray (SBC-3 5.25)."""
        if cdb[4] & _EJECT:
            raise CheckCondition(scsi.INVALID_FIELD_IN_CDB)
        if not cdb[4] & _START:
            self.disk.flush()
        return 0

    def _inquiry(self, cdb: bytes, data: Data) -> int:
        content = inquiry.inquiry(self.identity, cdb)
        return scsi.give(data, content, inquiry.allocation_length(cdb))

    @property
    def _mode(self) -> ModeParameters:
        return ModeParameters(
            self.state.write_cache, self.disk.read_only, self._blocks, self._sector
        )

    def _mode_sense(self, cdb: bytes, data: Data) -> int:
        return scsi.give(data, mode.mode_sense(cdb, self._mode), mode.allocation_length(cdb))

    def _mode_select(self, cdb: bytes, data: Data) -> int:
        length = mode.parameter_list_length(cdb)
        write_cache = mode.mode_select(cdb, scsi.take(data, length), self._mode)
        if self.state.write_cache and not write_cache:
            self.disk.flush()
        self.state.write_cache = write_cache
        return length

    def _read_capacity(self, cdb: bytes, data: Data) -> int:
        last = min(max(self._blocks - 1, 0), 0xFFFFFFFF)
        return scsi.give(data, struct.pack(">II", last, self._sector), 8)

    def _service_action_in(self, cdb: bytes, data: Data) -> int:
        """READ CAPACITY(16) (SBC-3 5.16)."""
        if cdb[1] & 0x1F != scsi.READ_CAPACITY_16:
            raise CheckCondition(scsi.INVALID_FIELD_IN_CDB)
        exponent = (self.disk.physical_sector_size // self._sector).bit_length() - 1
        provisioning = 0xC000 if self.identity.can_unmap else 0  # LBPME, LBPRZ
        content = struct.pack(
            ">QIBBH16x", max(self._blocks - 1, 0), self._sector, 0, exponent, provisioning
        )
        return scsi.give(data, content, int.from_bytes(cdb[10:14], "big"))
