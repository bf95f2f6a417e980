"""The control side of an adapter: RNDIS requests of the guest and their answers.

Which objects guests ask for is read from ``rndis_filter.c`` of Linux 6.1 and ``if_hn.c`` /
``hn_rndis.c`` of FreeBSD 14; the rest are those that [MS-RNDIS] calls mandatory.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from hvhost.errors import RemoteProtocolError
from hvhost.network import ndis, rndis
from hvhost.network.protocol import Capability, NvspVersion
from hvhost.network.rndis import Oid, RndisStatus, RndisType
from hvhost.network.state import LINK_SPEED, AdapterState

#: Frames that a guest may put into one message, and the alignment of each, 1 << 3 bytes.
FRAMES_PER_MESSAGE: Final = 8
ALIGNMENT_FACTOR: Final = 3
MAXIMUM_TRANSFER: Final = 0x4000
_MULTICAST_LIST_LIMIT = 256
_ADDRESS_SIZE = 6
_NETWORK_ADDRESS = "NetworkAddress"
_VENDOR = b"Hyper-V Virtual Ethernet Adapter\0"


class ControlSide:
    """Answers RNDIS requests out of, and into, *state*.

    ``mac`` is the adapter's own address, ``name`` what people call it, ``queues`` how many
    channels it may have. *changed* is called after the guest changed anything.
    """

    def __init__(
        self,
        state: AdapterState,
        *,
        mac: bytes,
        name: str,
        queues: int,
        may_change_mac: bool,
        changed: Callable[[], None],
    ) -> None:
        self._state = state
        self._mac, self._name, self._queues = mac, name, queues
        self._may_change_mac = may_change_mac
        self._changed = changed

    def answer(self, message: bytes) -> bytes | None:
        """The answer to a whole control message; ``None`` for one that has none.

        :class:`RemoteProtocolError` for what is no request at all; one that merely asks for
        something strange is refused.
        """
        kind, body = rndis.decode_control(message)
        if kind is RndisType.INIT:
            return self._initialize(rndis.Initialize.unpack(body))
        if kind is RndisType.HALT:
            self._state.initialized = False
            self._forget_filter()
            self._changed()
            return None
        if kind is RndisType.KEEPALIVE:
            request = rndis.Request.unpack(body).req_id
            return rndis.encode(RndisType.KEEPALIVE_C, rndis.SetComplete(request, 0))
        if kind is RndisType.RESET:
            self._forget_filter()
            self._changed()
            return rndis.encode(RndisType.RESET_C, rndis.ResetComplete(0, 1))
        if kind not in (RndisType.QUERY, RndisType.SET):
            raise RemoteProtocolError(f"RNDIS {kind.name} is for hosts to send.")
        if not self._state.initialized:
            raise RemoteProtocolError(f"RNDIS {kind.name} came before INITIALIZE.")
        request_body = rndis.Query.unpack(body)
        data = rndis.information(body, request_body)
        if kind is RndisType.QUERY:
            found = self._query(request_body.oid, data)
            status = RndisStatus.NOT_SUPPORTED if found is None else RndisStatus.SUCCESS
            return rndis.query_answer(request_body.req_id, status, found or b"")
        try:
            status = self._set(request_body.oid, data)
        except RemoteProtocolError:
            status = RndisStatus.INVALID_DATA
        self._changed()
        return rndis.encode(RndisType.SET_C, rndis.SetComplete(request_body.req_id, status))

    def _forget_filter(self) -> None:
        self._state.filter, self._state.multicast = 0, frozenset()

    def _initialize(self, request: rndis.Initialize) -> bytes:
        self._state.initialized = True
        return rndis.encode(
            RndisType.INIT_C,
            rndis.InitializeComplete(
                request.req_id,
                RndisStatus.SUCCESS,
                rndis.MAJOR_VERSION,
                rndis.MINOR_VERSION,
                rndis.DF_CONNECTIONLESS,
                rndis.MEDIUM_802_3,
                FRAMES_PER_MESSAGE,
                MAXIMUM_TRANSFER,
                ALIGNMENT_FACTOR,
            ),
        )

    @property
    def can_merge(self) -> bool:
        """The guest's driver can take merged segments."""
        state = self._state
        version = state.version or 0
        return version >= NvspVersion.V61 and bool(state.capabilities & Capability.RSC)

    def _query(self, oid: int, data: bytes) -> bytes | None:
        state, counters = self._state, self._state.counters
        frame = state.mtu + 14
        words: dict[int, int] = {
            Oid.GEN_HARDWARE_STATUS: 0,
            Oid.GEN_MEDIA_SUPPORTED: 0,
            Oid.GEN_MEDIA_IN_USE: 0,
            Oid.GEN_MAXIMUM_FRAME_SIZE: state.mtu,
            Oid.GEN_LINK_SPEED: LINK_SPEED,
            Oid.GEN_TRANSMIT_BLOCK_SIZE: frame,
            Oid.GEN_RECEIVE_BLOCK_SIZE: frame,
            Oid.GEN_MAXIMUM_TOTAL_SIZE: frame,
            Oid.GEN_VENDOR_ID: int.from_bytes(self._mac[:3], "little"),
            Oid.GEN_VENDOR_DRIVER_VERSION: 0x10000,
            Oid.GEN_CURRENT_PACKET_FILTER: state.filter,
            Oid.GEN_MAC_OPTIONS: 0,
            Oid.GEN_MEDIA_CONNECT_STATUS: 0 if state.link else 1,
            Oid.GEN_XMIT_OK: counters.transmitted,
            Oid.GEN_RCV_OK: counters.received,
            Oid.GEN_XMIT_ERROR: counters.transmit_errors,
            Oid.GEN_RCV_ERROR: counters.receive_errors,
            Oid.GEN_RCV_NO_BUFFER: counters.no_buffer,
            Oid.IEEE_802_3_MAXIMUM_LIST_SIZE: _MULTICAST_LIST_LIMIT,
        }
        if oid in words:
            return struct.pack("<I", words[oid] & 0xFFFFFFFF)
        if oid == Oid.GEN_SUPPORTED_LIST:
            return struct.pack(f"<{len(Oid)}I", *Oid)
        if oid == Oid.GEN_VENDOR_DESCRIPTION:
            return _VENDOR
        if oid == Oid.GEN_FRIENDLY_NAME:
            return self._name.encode("utf-16-le")
        if oid == Oid.IEEE_802_3_PERMANENT_ADDRESS:
            return self._mac
        if oid == Oid.IEEE_802_3_CURRENT_ADDRESS:
            return state.mac
        if oid == Oid.IEEE_802_3_MULTICAST_LIST:
            return b"".join(sorted(state.multicast))
        if oid in (Oid.TCP_OFFLOAD_HARDWARE_CAPABILITIES, Oid.TCP_OFFLOAD_CURRENT_CONFIG):
            # A guest says in its question what it knows; older ones say nothing.
            revision = data[1] if len(data) > 1 else 1
            return ndis.offload_capabilities(revision, merging=self.can_merge)
        if oid == Oid.GEN_RECEIVE_SCALE_CAPABILITIES:
            return ndis.receive_scale_capabilities(self._queues)
        return None

    def _set(self, oid: int, data: bytes) -> RndisStatus:
        state = self._state
        if oid == Oid.GEN_CURRENT_PACKET_FILTER:
            if len(data) < 4:
                return RndisStatus.INVALID_LENGTH
            state.filter = int.from_bytes(data[:4], "little")
        elif oid == Oid.TCP_OFFLOAD_PARAMETERS:
            merging = ndis.merging_wanted(data)
            if merging is not None:
                state.merging = merging and self.can_merge
        elif oid == Oid.GEN_RECEIVE_SCALE_PARAMETERS:
            state.scaling = ndis.receive_scaling(data, state.scaling, 1 + state.subchannels)
        elif oid == Oid.GEN_RNDIS_CONFIG_PARAMETER:
            return self._configure(*rndis.config_parameter(data))
        elif oid == Oid.IEEE_802_3_MULTICAST_LIST:
            if len(data) % _ADDRESS_SIZE:
                return RndisStatus.INVALID_LENGTH
            if len(data) > _MULTICAST_LIST_LIMIT * _ADDRESS_SIZE:
                return RndisStatus.MULTICAST_FULL
            state.multicast = frozenset(
                data[start : start + _ADDRESS_SIZE] for start in range(0, len(data), _ADDRESS_SIZE)
            )
        elif oid == Oid.OFFLOAD_ENCAPSULATION:
            pass  # Ethernet; there is no other
        else:
            return RndisStatus.NOT_SUPPORTED
        return RndisStatus.SUCCESS

    def _configure(self, name: str, value: str) -> RndisStatus:
        if name.rstrip("\0") != _NETWORK_ADDRESS:
            return RndisStatus.NOT_SUPPORTED
        try:
            mac = bytes.fromhex(value)
        except ValueError:
            return RndisStatus.INVALID_DATA
        if len(mac) != 6 or mac[0] & 1 or not any(mac):
            return RndisStatus.INVALID_DATA
        if not self._may_change_mac and mac != self._mac:
            return RndisStatus.FAILURE
        self._state.mac = mac
        return RndisStatus.SUCCESS
