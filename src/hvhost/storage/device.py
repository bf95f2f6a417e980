"""A storage controller as a device of the bus, for SCSI and for fibre channel.

Requests arrive on the controller's channel and on the sub-channels that the guest asked for. Each
is checked and looked up here, under the bus's lock, and executed by its unit's worker, so that no
disk ever holds the bus up; the most frequent ones take a shorter way (:mod:`hvhost.storage.quick`).
What the guest may rely on:

* Commands to one unit take effect in the order of each channel; between channels there is none.
  For flushes and the write cache see ``block.py``.
* Units live at path 0, target 0. Anything else has none: INQUIRY says so with qualifier 3, every
  other command fails with sense, never with INVALID_LUN, upon which Linux removes the unit of the
  same number at path 0. A unit that was removed answers INVALID_LUN: so the guest learns of it.
* When units come, go or change, the guest is sent ENUMERATE_BUS and looks for itself. Not before it
  sent a command: Linux would put the work into a queue that its ``storvsc_probe`` makes only once
  initialization is over, and panic. Its first command begins a look of its own.
* A channel that closes, by whatever cause, takes the requests with it that have not begun; those
  that have are waited for, since they use the guest's memory.

Saving a controller is saving :class:`ControllerState` once no request is under way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from hvhost.errors import RemoteProtocolError
from hvhost.storage import inquiry, protocol, scsi
from hvhost.storage.buffers import section, total
from hvhost.storage.protocol import (
    ChannelProperties,
    Command,
    Operation,
    ProtocolVersion,
    SrbStatus,
    StorageVersion,
    SubChannelCount,
    WorldWideNames,
    complete,
    complete_request,
)
from hvhost.storage.quick import QuickPath
from hvhost.storage.scsi import OpCode, ScsiStatus
from hvhost.storage.session import ChannelSession, ControllerState, Phase, Surface
from hvhost.storage.worker import Request, UnitWorker, check_condition
from hvhost.vmbus.channel import Channel, Offer, Packet, PacketType

MAXIMUM_LUNS: Final = 64
#: Virtual processors for each sub-channel beyond the first one.
PROCESSORS_PER_CHANNEL: Final = 4


class StorageController:
    """The controller offered with *offer*; fibre channel if it has *names*.

    ``units`` are its logical units by LUN; change them through :meth:`add` and :meth:`remove`.
    All methods are called with the bus's lock held.
    """

    def __init__(self, offer: Offer, surface: Surface, names: WorldWideNames | None = None) -> None:
        self.offer = offer
        self.state = ControllerState()
        self.units: dict[int, UnitWorker] = {}
        self._surface, self._names = surface, names
        self._channel: Channel | None = None
        self._session: ChannelSession | None = None
        self._packet_size = protocol.PACKET_SIZE
        self._operations: dict[Operation, Callable[[Packet], bytes]] = {
            Operation.BEGIN_INITIALIZATION: self._begin,
            Operation.QUERY_PROTOCOL_VERSION: self._query_version,
            Operation.QUERY_PROPERTIES: self._query_properties,
            Operation.FCHBA_DATA: self._fchba_data,
            Operation.END_INITIALIZATION: self._end,
            Operation.CREATE_SUB_CHANNELS: self._create_sub_channels,
            # Whatever was sent before is answered all the same, so nothing is left to be reset.
            Operation.RESET_LUN: lambda packet: complete(packet.payload),
            Operation.RESET_ADAPTER: lambda packet: complete(packet.payload),
            Operation.RESET_BUS: lambda packet: complete(packet.payload),
        }

    # Units.

    def add(self, lun: int, worker: UnitWorker) -> None:
        """A unit from now on; call :meth:`announce` when all is done."""
        self.units[lun] = worker
        self.state.units[lun] = worker.unit.state
        self.state.leaving.discard(lun)

    def remove(self, lun: int) -> None:
        """No new requests for it; call :meth:`announce` when all is done."""
        del self.units[lun], self.state.units[lun]
        if self.state.phase is Phase.IN_USE:
            self.state.leaving.add(lun)

    def announce(self) -> None:
        """Have the guest look for units that came, went or have something to tell."""
        if self._channel is not None and self.state.phase is Phase.IN_USE:
            self._channel.send(protocol.notice(Operation.ENUMERATE_BUS, self._packet_size))

    # For the channel.

    def opened(self, channel: Channel) -> None:
        self._channel = channel
        self._session = ChannelSession(channel, self._surface)
        channel.serve = QuickPath(self.state, self.units, self._session, self._surface).serve
        self.state.phase, self.state.version = Phase.CLOSED, 0

    def closed(self) -> None:
        session, self._session, self._channel = self._session, None, None
        self.state.phase, self.state.version, self.state.sub_channels = Phase.CLOSED, 0, 0
        self.state.leaving.clear()
        self._surface.remove_sub_channels()
        if session is not None:
            session.end()

    def received(self, packet: Packet) -> None:
        session = self._session
        assert session is not None and self._channel is not None
        command = self.parse(packet)
        if command.operation == protocol.EXECUTE_SRB:
            answer = self.execute(session, packet, command)
            if answer is None:
                return
        else:
            operation = protocol.parse_operation(command.operation)
            handler = self._operations.get(operation)
            if handler is None:
                raise RemoteProtocolError(f"{operation.name} is for hosts to send.")
            answer = handler(packet)
        self._channel.send_completion(packet.transaction_id, answer)

    @staticmethod
    def parse(packet: Packet) -> Command:
        """What a packet asks; :class:`RemoteProtocolError` if it cannot be."""
        kind = packet.type
        if kind is not PacketType.DATA_USING_GPA_DIRECT and kind is not PacketType.DATA_INBAND:
            raise RemoteProtocolError(f"a storage controller got a packet {packet.type.name}.")
        return protocol.parse_command(packet.payload)

    # Initialization.

    def _need(self, phase: Phase, what: str) -> None:
        if self.state.phase < phase:
            raise RemoteProtocolError(f"{what} came too early: not yet {phase.name}.")

    def _begin(self, packet: Packet) -> bytes:
        self.state.phase, self.state.version = Phase.BEGUN, 0
        return complete(packet.payload)

    def _query_version(self, packet: Packet) -> bytes:
        self._need(Phase.BEGUN, "QUERY_PROTOCOL_VERSION")
        number = ProtocolVersion.unpack(packet.payload, protocol.HEADER_SIZE).major_minor
        if number not in StorageVersion.__members__.values():
            return complete(packet.payload, protocol.STATUS_REVISION_MISMATCH)
        self.state.phase, self.state.version = Phase.NEGOTIATED, number
        self._packet_size = (
            protocol.PACKET_SIZE if number >= StorageVersion.WIN8 else protocol.OLD_PACKET_SIZE
        )
        return complete(packet.payload)

    def _query_properties(self, packet: Packet) -> bytes:
        self._need(Phase.NEGOTIATED, "QUERY_PROPERTIES")
        count = self._maximum_sub_channels()
        return complete(
            packet.payload,
            body=ChannelProperties(
                max_channel_count=count,
                flags=protocol.SUPPORTS_MULTI_CHANNEL if count else 0,
                max_transfer_bytes=inquiry.MAXIMUM_TRANSFER,
            ),
        )

    def _maximum_sub_channels(self) -> int:
        if self.state.version < StorageVersion.WIN8:
            return 0
        return (self._surface.processors - 1) // PROCESSORS_PER_CHANNEL

    def _fchba_data(self, packet: Packet) -> bytes:
        if self._names is None:
            return complete(packet.payload, protocol.STATUS_INVALID_DEVICE_REQUEST)
        return complete(packet.payload, body=self._names)

    def _end(self, packet: Packet) -> bytes:
        self._need(Phase.NEGOTIATED, "END_INITIALIZATION")
        self.state.phase = Phase.READY
        return complete(packet.payload)

    def _create_sub_channels(self, packet: Packet) -> bytes:
        self._need(Phase.READY, "CREATE_SUB_CHANNELS")
        count = SubChannelCount.unpack(packet.payload, protocol.HEADER_SIZE).count
        if not 0 < count <= self._maximum_sub_channels() or self.state.sub_channels:
            return complete(packet.payload, protocol.STATUS_INVALID_PARAMETER)
        self.state.sub_channels = count
        self._surface.add_sub_channels(count)
        return complete(packet.payload)

    # Commands.

    def execute(self, session: ChannelSession, packet: Packet, request: Command) -> bytes | None:
        """Begin a command; its answer if there is one at once."""
        if self.state.phase is not Phase.IN_USE:
            self._need(Phase.READY, "EXECUTE_SRB")
            self.state.phase = Phase.IN_USE
        data = self._buffers(packet, request.data_transfer_length)
        if request.path_id or request.target_id:
            return self._nobody(packet.payload, request, data)
        worker = self.units.get(request.lun)
        if worker is None:
            return self._absent(packet.payload, request, data)
        command = Request(session, packet.transaction_id, packet.payload, request.cdb, data)
        if request.cdb_length < scsi.COMMAND_LENGTHS[request.cdb[0] >> 5]:
            return command.failure(scsi.INVALID_FIELD_IN_CDB)
        if request.cdb[0] == OpCode.REPORT_LUNS:
            return self._report_luns(packet.payload, request, data, sorted(self.units))
        session.submit(worker, command)
        return None

    def _buffers(self, packet: Packet, length: int) -> Sequence[memoryview]:
        """The guest's buffers: pages of one range or many, in order, of *length* bytes."""
        views: Sequence[memoryview] = ()
        if packet.type is PacketType.DATA_USING_GPA_DIRECT:
            views = packet.views(self._surface.memory)
        there = total(views)
        if there == length:
            return views
        if there < length:
            raise RemoteProtocolError(
                f"a SCSI request of {length} bytes names memory of {there} bytes."
            )
        return section(views, 0, length)

    def _report_luns(
        self, payload: bytes, request: Command, data: Sequence[memoryview], luns: Sequence[int]
    ) -> bytes:
        select, allocation = request.cdb[2], int.from_bytes(request.cdb[6:10], "big")
        if select not in (0, 1, 2):
            return check_condition(payload, scsi.INVALID_FIELD_IN_CDB)
        if select == 1:  # well known units only, of which there are none
            luns = ()
        count = scsi.give(data, scsi.report_luns(luns), allocation)
        return complete_request(payload, SrbStatus.SUCCESS, ScsiStatus.GOOD, count)

    def _absent(self, payload: bytes, request: Command, data: Sequence[memoryview]) -> bytes:
        """No unit of that number, at the place where the others are."""
        match request.cdb[0]:
            case OpCode.INQUIRY:
                return self._inquire_nothing(payload, request, data)
            case OpCode.REPORT_LUNS:
                return self._report_luns(payload, request, data, sorted(self.units))
        self.state.leaving.discard(request.lun)
        return complete_request(payload, SrbStatus.INVALID_LUN, ScsiStatus.GOOD, 0)

    def _nobody(self, payload: bytes, request: Command, data: Sequence[memoryview]) -> bytes:
        """A path or target that does not exist."""
        match request.cdb[0]:
            case OpCode.INQUIRY:
                return self._inquire_nothing(payload, request, data)
            case OpCode.REPORT_LUNS:
                return self._report_luns(payload, request, data, ())
        return check_condition(payload, scsi.LOGICAL_UNIT_NOT_SUPPORTED)

    def _inquire_nothing(
        self, payload: bytes, request: Command, data: Sequence[memoryview]
    ) -> bytes:
        allocation = inquiry.allocation_length(request.cdb)
        count = scsi.give(data, inquiry.absent(), allocation)
        return complete_request(payload, SrbStatus.SUCCESS, ScsiStatus.GOOD, count)


class SubChannel:
    """One more channel of *controller*: commands only."""

    def __init__(self, offer: Offer, controller: StorageController, surface: Surface) -> None:
        self.offer = offer
        #: All there is to resume is the controller's.
        self.state = controller.state
        self._controller, self._surface = controller, surface
        self._session: ChannelSession | None = None
        self._channel: Channel | None = None

    def opened(self, channel: Channel) -> None:
        self._channel = channel
        self._session = ChannelSession(channel, self._surface)
        units = self._controller.units
        channel.serve = QuickPath(self.state, units, self._session, self._surface).serve

    def closed(self) -> None:
        session, self._session, self._channel = self._session, None, None
        if session is not None:
            session.end()

    def received(self, packet: Packet) -> None:
        assert self._session is not None and self._channel is not None
        command = self._controller.parse(packet)
        if command.operation != protocol.EXECUTE_SRB:
            raise RemoteProtocolError("a sub-channel of a storage controller takes commands only.")
        answer = self._controller.execute(self._session, packet, command)
        if answer is not None:
            self._channel.send_completion(packet.transaction_id, answer)
