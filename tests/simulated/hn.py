"""FreeBSD's driver, ``hn(4)``: all that it sends, in its order, and all that it looks at.

Source: ``hn_nvs.c``, ``hn_rndis.c``, ``if_hn.c``, ``if_hnreg.h`` and ``ndis.h`` of
``sys/dev/hyperv/netvsc``, FreeBSD 14. Functions have its names; where an answer would make it give
up, there is an assertion. Messages and layouts are written here once more.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from hvhost.network.device import NetworkAdapter
from hvhost.partition.memory import PAGE_SIZE
from hvhost.vmbus.protocol import GpadlTeardown, GpadlTorndown
from simulated.driver import GuestChannel, GuestPacket, SimulatedGuest
from simulated.hn_frames import HN_NVS_RXBUF_SIG, Rxbuf
from simulated.netvsc import MAC, Received, RecordingWire

HN_NVS_VERSIONS = (0x60001, 0x60000, 0x50000, 0x40000, 0x30002, 0x00002)
HN_NVS_CHIM_SIG = 0xFACE
HN_NVS_CHIM_IDX_INVALID = 0xFFFFFFFF
HN_NVS_NDIS_CONF_SRIOV, HN_NVS_NDIS_CONF_VLAN, HN_NVS_NDIS_CONF_RSC = 0x4, 0x8, 0x80
HN_CHIM_SIZE = 15 << 20
IP_MAXPACKET = 65535
NDIS_HASH_INDCNT = 128
NDIS_OFFLOAD_SIZE_6_0, NDIS_OFFLOAD_SIZE_6_1, NDIS_OFFLOAD_SIZE = 112, 144, 156
NDIS_RSS_CAPS_SIZE_6_0, NDIS_RSS_CAPS_SIZE = 16, 18
NDIS_RSS_FLAG_NONE, NDIS_RSS_FLAG_DISABLE = 0x0, 0x10
#: As kernel addresses are: a transaction is known by that of its context.
SENDCTX_NONE = 0xFFFF_FFFF_8123_4560
_XACT = 0xFFFF_F800_0BAD_F000
_TXD = 0xFFFF_FE00_1234_0000
_RC = 1  # VMBUS_CHANPKT_FLAG_RC: completion is asked for


class HnDriver:
    """One adapter's driver. *rings* is ``hn_rx_ring_cnt``, *rsc* ``hn_rsc_ctrl``.

    *message_size*: messages have 40 bytes since NVS 6.1 is known, and had 32 before.
    """

    def __init__(
        self,
        *,
        queues: int = 4,
        rings: int = 4,
        versions: Sequence[int] = HN_NVS_VERSIONS,
        message_size: int = 40,
        offload_size: int = NDIS_OFFLOAD_SIZE,
        rxbuf_size: int = 4 << 20,
        chim_size: int = 96 * PAGE_SIZE,
        ring_pages: int = 8,
        rsc: bool = False,
    ) -> None:
        self.versions, self.message_size, self.offload_size = versions, message_size, offload_size
        self.rings, self.ring_pages, self.rsc = rings, ring_pages, rsc
        pages = (rxbuf_size + chim_size) // PAGE_SIZE + 2 * rings * ring_pages + 64
        self.guest = SimulatedGuest(pages=pages, processors=max(rings, 1))
        self.wire = RecordingWire()
        self.adapter = NetworkAdapter(
            "hn0", MAC, self.guest.memory, self.guest.server, self.wire, queues=queues
        )
        self.guest.server.add_device(self.adapter)
        (self.prichan,) = self.guest.connect(0x40000)
        self.rxbuf = self.guest.allocate(rxbuf_size // PAGE_SIZE)
        self.chim = self.guest.allocate(chim_size // PAGE_SIZE)
        (self.xact_page,) = self.guest.allocate(1)
        self.version = 0
        self.ndis_version = 0
        self.caps: set[str] | None = None
        self.channels: list[GuestChannel] = []
        self.subchannels: list[int] = []
        self.done: list[tuple[int, int]] = []  # channel, transaction
        self.frames: list[Received] = []
        self.link_changes = 0
        self._answers: dict[int, bytes] = {}
        self._controls: list[bytes] = []
        self._rid = self._txd = 0

    # hn_nvs.c

    def _nvs(self, message: bytes) -> bytes:
        return message.ljust(self.message_size, b"\0")

    def _nvs_xact_execute(self, message: bytes, least: int, kind: int) -> bytes:
        channel = self.channels[0]
        assert channel.write(self._nvs(message), flags=_RC, transaction_id=_XACT)
        self.read()
        answer = self._answers.pop(_XACT, None)
        assert answer is not None, f"it waits for ever; faults: {self.guest.faults}"
        assert len(answer) >= least and struct.unpack_from("<I", answer)[0] == kind
        return answer

    def _nvs_req_send(self, message: bytes) -> None:
        """Nobody waits for an answer, and none is asked for."""
        assert self.channels[0].write(self._nvs(message), transaction_id=SENDCTX_NONE)

    def _nvs_doinit(self, version: int) -> bool:
        answer = self._nvs_xact_execute(struct.pack("<III", 1, version, version), 16, 2)
        return bool(struct.unpack_from("<I", answer, 12)[0] == 1)

    def nvs_attach(self, mtu: int) -> None:
        if self.version:
            assert self._nvs_doinit(self.version), "what was agreed on must not change"
        else:
            self.version = next(each for each in self.versions if self._nvs_doinit(each))
            self.ndis_version = 0x6001E if self.version > 0x40000 else 0x60001
        if self.version >= 0x30002:
            caps = HN_NVS_NDIS_CONF_VLAN
            caps |= HN_NVS_NDIS_CONF_SRIOV if self.version >= 0x50000 else 0
            caps |= HN_NVS_NDIS_CONF_RSC if self.version >= 0x60001 else 0
            self._nvs_req_send(struct.pack("<IIIQ", 125, mtu + 14, 0, caps))
        ndis = self.ndis_version
        self._nvs_req_send(struct.pack("<III", 100, ndis >> 16, ndis & 0xFFFF))
        self.rxbuf_gpadl, status = self._gpadl(self.rxbuf)
        assert status == 0
        message = struct.pack("<IIH", 101, self.rxbuf_gpadl, HN_NVS_RXBUF_SIG)
        answer = self._nvs_xact_execute(message, 12, 102)
        assert struct.unpack_from("<I", answer, 4)[0] == 1
        self.chim_gpadl, status = self._gpadl(self.chim)
        assert status == 0
        message = struct.pack("<IIH", 104, self.chim_gpadl, HN_NVS_CHIM_SIG)
        status, self.chim_szmax = struct.unpack_from(
            "<II", self._nvs_xact_execute(message, 12, 105), 4
        )
        assert status == 1 and self.chim_szmax and self.chim_szmax % 4 == 0
        self.chim_cnt = len(self.chim) * PAGE_SIZE // self.chim_szmax // 64 * 64

    def _gpadl(self, pages: list[int]) -> tuple[int, int]:
        return self.guest.make_gpadl(self.prichan, [(len(pages) * PAGE_SIZE, 0, pages)])

    def nvs_detach(self) -> None:
        for kind, signature in ((103, HN_NVS_RXBUF_SIG), (106, HN_NVS_CHIM_SIG)):
            self._nvs_req_send(struct.pack("<IH", kind, signature))
            assert not self.channels[0].out.used, "it waits until the host has read it"

    def nvs_alloc_subchans(self, count: int) -> int:
        answer = self._nvs_xact_execute(struct.pack("<III", 133, 1, count), 12, 133)
        status, given = struct.unpack_from("<II", answer, 4)
        assert status == 1
        return min(count, int(given))

    # hn_rndis.c

    def _rndis_send(self, message: bytes, transaction: int) -> None:
        self.guest.memory.write(self.xact_page * PAGE_SIZE, message)
        assert self.channels[0].write(
            self._nvs(struct.pack("<IIII", 107, 1, HN_NVS_CHIM_IDX_INVALID, 0)),
            packet_type=9,
            flags=_RC,
            transaction_id=transaction,
            header=struct.pack("<IIIIQ", 0, 1, len(message), 0, self.xact_page),
        )
        self.read()

    def _rndis_xact_execute(self, kind: int, body: bytes, least: int) -> bytes:
        self._rid += 1
        request = (self._rid & 0xFFFF) << 16  # the upper bits tell it from old messages
        self._rndis_send(struct.pack("<III", kind, 12 + len(body), request) + body, SENDCTX_NONE)
        assert self._controls, f"it waits for ever; faults: {self.guest.faults}"
        answer = self._controls.pop()
        assert len(answer) >= least
        answered, length, answered_request = struct.unpack_from("<III", answer)
        assert (answered, answered_request) == (kind | 1 << 31, request) and length >= least
        return answer

    def rndis_query(self, oid: int, data: bytes, most: int, least: int) -> bytes:
        """hn_rndis_query2(); it gives an offset even where it has nothing to say."""
        body = struct.pack("<IIII", oid, len(data), 20, 0) + data
        answer = self._rndis_xact_execute(4, body, 24 + least)
        status, length, offset = struct.unpack_from("<III", answer, 12)
        assert status == 0 and length and offset
        start = 8 + offset
        assert start >= 24 and start + length <= len(answer)
        return answer[start : start + min(length, most)]

    def rndis_set(self, oid: int, data: bytes) -> None:
        body = struct.pack("<IIII", oid, len(data), 20, 0) + data
        assert struct.unpack_from("<I", self._rndis_xact_execute(5, body, 16), 12)[0] == 0

    def rndis_get(self, oid: int, size: int) -> bytes:
        """hn_rndis_get_eaddr(), …_linkstatus() and …_mtu()."""
        found = self.rndis_query(oid, b"", size, size)
        assert len(found) == size
        return found

    def rndis_attach(self, mtu: int) -> set[str]:
        """hn_rndis_init() and hn_rndis_conf_offload(); what the host can do (HN_CAP_*)."""
        answer = self._rndis_xact_execute(2, struct.pack("<III", 1, 0, 2048), 48)
        (status,) = struct.unpack_from("<I", answer, 12)
        assert status == 0
        self.agg_pkts, self.agg_size, align = struct.unpack_from("<III", answer, 32)
        self.agg_align = max(1 << align, 4)
        return self.rndis_conf_offload(mtu)

    def rndis_conf_offload(self, mtu: int) -> set[str]:
        new = self.ndis_version >= 0x6001E
        revision, size = (3, self.offload_size) if new else (2, NDIS_OFFLOAD_SIZE_6_1)
        question = struct.pack("<BBH", 0xA7, revision, size).ljust(size, b"\0")
        caps = self.rndis_query(
            0xFC01020D, question, self.offload_size if new else size, NDIS_OFFLOAD_SIZE_6_0
        )
        kind, revision, size = struct.unpack_from("<BBH", caps)
        assert kind == 0xA7 and revision >= 1 and NDIS_OFFLOAD_SIZE_6_0 <= size <= len(caps)
        assert revision < 3 or size >= NDIS_OFFLOAD_SIZE
        tx4, rx4, tx6, rx6 = struct.unpack_from("<4xI4xI4xI4xI", caps, 4)
        self.lsov2 = struct.unpack_from("<7I", caps, 80)
        encap4, largest4, least4, encap6, largest6, least6, options6 = self.lsov2
        found: set[str] = set()
        parameters = bytearray(32)
        if encap4 & 2:
            found.add("TSO4")
            parameters[11] = 2
        if encap6 & 2 and options6 & 5 == 5:
            found.add("TSO6")
            parameters[12] = 2
        largest, least = min(IP_MAXPACKET, largest4, largest6), max(2, least4, least6)
        if largest < least * mtu:
            found -= {"TSO4", "TSO6"}
            parameters[11:13] = b"\1\1"
        for place, name, wanted, sends, receives in (
            (4, "IPCS", 0x101, tx4, rx4 & 0x100),
            (5, "TCP4CS", 0x014, tx4, rx4 & 0x010),
            (6, "UDP4CS", 0x040, tx4, rx4 & 0x040),
            (7, "TCP6CS", 0x015, tx6, rx6 & 0x010),
            (8, "UDP6CS", 0x041, tx6, rx6 & 0x040),
        ):
            does = sends & wanted == wanted
            parameters[place] = (2 if does else 0, 4 if does else 3)[bool(receives)]
            if does:
                found.add(name)
        if revision >= 3 and self.message_size == 40:
            merges = all(caps[144:146]) and self.rsc
            parameters[22:24] = b"\2\2" if merges else b"\1\1"
        size = 32 if new else 22
        parameters[:4] = struct.pack("<BBH", 0x80, 3 if new else 2, size)
        self.rndis_set(0xFC01020C, bytes(parameters[:size]))
        return found

    def rndis_query_rsscaps(self) -> int:
        """How many rings may be used; 1 without receive scaling."""
        if self.ndis_version < 0x60014:
            return 1
        size = NDIS_RSS_CAPS_SIZE
        question = struct.pack("<BBH", 0x88, 2, size).ljust(size, b"\0")
        caps = self.rndis_query(0x00010203, question, size, NDIS_RSS_CAPS_SIZE_6_0)
        kind, revision, said, flags, _, rings = struct.unpack_from("<BBHIII", caps)
        assert kind == 0x88 and revision >= 1 and NDIS_RSS_CAPS_SIZE_6_0 <= said <= len(caps)
        assert rings and flags & 1 and flags & 0x300 == 0x300
        self.ind_size = NDIS_HASH_INDCNT
        if said == size and revision >= 2:
            (self.ind_size,) = struct.unpack_from("<H", caps, 16)
            assert self.ind_size <= NDIS_HASH_INDCNT and not self.ind_size & self.ind_size - 1
        return min(int(rings), self.ind_size)

    def rndis_conf_rss(self, table: Sequence[int], key: bytes, flags: int = 0) -> None:
        """The key stands before the table (struct ndis_rssprm_toeplitz), its room always whole."""
        size = 80 + 4 * self.ind_size
        head = struct.pack(
            "<BBHHHIHHIHHIIII",
            *(0x89, 2, size, flags, 0, 0x1700 | 1, 4 * self.ind_size, 0, 80),
            *(40, 0, 40, 0, 0, 0),
        )
        self.rndis_set(0x10204, head + key + struct.pack(f"<{self.ind_size}I", *table))

    def rndis_halt(self) -> None:
        """No answer of RNDIS comes: that the message was taken is enough."""
        self._rid += 1
        self._rndis_send(struct.pack("<III", 3, 12, (self._rid & 0xFFFF) << 16), _XACT)
        assert self._answers.pop(_XACT, None) is not None, "it waits for ever"
        assert not self._controls

    def set_rxfilter(self, value: int) -> None:
        self.rndis_set(0x1010E, struct.pack("<I", value))

    # if_hn.c

    def synth_attach(self, mtu: int, key: bytes) -> None:
        """hn_synth_attach(): all channels, and no frames yet."""
        self.channels = [self._chan_attach(self.prichan, 0)]
        self.nvs_attach(mtu)
        found = self.rndis_attach(mtu) | ({"HASHVAL"} if self.version >= 0x50000 else set())
        assert self.caps in (None, found), "it takes no other host"
        self.caps = found
        self.subchannels = []
        channels = min(self.rings, self.rndis_query_rsscaps()) if self.rings > 1 else 1
        if channels > 1 and (count := self.nvs_alloc_subchans(channels - 1)):
            self.guest.collect_offers()
            offers = self.guest.offers
            self.subchannels = sorted(set(offers) - {self.prichan})
            assert len(self.subchannels) == count, "it waits until they are all offered"
            indices = [offers[relid].sub_channel_index for relid in self.subchannels]
            assert indices == list(range(1, count + 1))
            for index, relid in zip(indices, self.subchannels, strict=True):
                self.channels.append(self._chan_attach(relid, index))
            table = [number % (count + 1) for number in range(self.ind_size)]
            self.rndis_conf_rss(table, key)
        self.set_rxfilter(0)
        self.read()

    def _chan_attach(self, relid: int, processor: int) -> GuestChannel:
        pages = self.ring_pages
        return self.guest.open(relid, out_pages=pages, in_pages=pages, vp=processor)

    def synth_detach(self) -> None:
        """hn_suspend_data() and hn_synth_detach(); buffers are taken back when all is closed."""
        self.set_rxfilter(0)
        self.read()
        self.rndis_halt()
        self.nvs_detach()
        before = len(self.guest.port.messages)
        for relid in [*self.subchannels, self.prichan]:
            self.guest.close(relid)
        self.guest._seen = before
        rescinded = self.guest.take_rescinds()
        assert sorted(rescinded) == self.subchannels, "vmbus_subchan_drain() waits for it"
        for handle in (self.rxbuf_gpadl, self.chim_gpadl):
            self.guest.post(GpadlTeardown(self.prichan, handle))
            assert self.guest.reply(GpadlTorndown).gpadl == handle
        self.channels = []

    def linkstatus(self) -> bool:
        return self.rndis_get(0x00010114, 4) == bytes(4)

    def txpkt_chim(self, messages: Sequence[bytes], *, ring: int = 0, section: int = 0) -> int:
        """Frames in one section of the buffer, each but the last padded (hn_try_txagg())."""
        data = b""
        for number, message in enumerate(messages):
            if number < len(messages) - 1:
                size = -(-len(message) // self.agg_align) * self.agg_align
                padded = bytearray(message.ljust(size, b"\xee"))
                struct.pack_into("<I", padded, 4, size)
                message = bytes(padded)
            data += message
        assert len(data) <= min(self.agg_size, self.chim_szmax) and section < self.chim_cnt
        assert len(messages) <= self.agg_pkts
        at = self.chim[0] * PAGE_SIZE + section * self.chim_szmax
        self.guest.memory.write(at, data)
        return self._txpkt(ring, section, len(data), b"")

    def txpkt_sglist(self, head: bytes, pieces: Sequence[bytes], *, ring: int = 0) -> int:
        """One frame in pieces that begin anywhere, its RNDIS message *head* in one of its own."""
        ranges = b""
        for number, piece in enumerate((head, *pieces)):
            (page,) = self.guest.allocate(1)
            offset = 64 * number + 14  # an mbuf's data begin where the IP header is aligned
            self.guest.memory.write(page * PAGE_SIZE + offset, piece)
            ranges += struct.pack("<IIQ", len(piece), offset, page)
        header = struct.pack("<II", 0, 1 + len(pieces)) + ranges
        return self._txpkt(ring, HN_NVS_CHIM_IDX_INVALID, 0, header)

    def _txpkt(self, ring: int, section: int, size: int, header: bytes) -> int:
        self._txd += 0x80
        transaction = _TXD + self._txd
        assert self.channels[ring].write(
            self._nvs(struct.pack("<IIII", 107, 0, section, size)),
            packet_type=9 if header else 6,
            flags=_RC,
            transaction_id=transaction,
            header=header,
        )
        return transaction

    def pull(self) -> list[Received]:
        """The wire has frames: what the driver hands up."""
        while self.adapter.readable() or self.wire.incoming:
            self.read()
        self.read()
        taken, self.frames = self.frames, []
        return taken

    def read(self) -> None:
        """hn_chan_callback() of each channel."""
        for number, channel in enumerate(self.channels):
            for packet in channel.read():
                if packet.type == 11:
                    self._handle_comp(packet, number)
                elif packet.type == 7:
                    self._handle_rxbuf(packet, number, channel)
                else:
                    kind = struct.unpack_from("<I", packet.payload)[0]
                    assert (packet.type, kind) == (6, 134), "it would log an unknown message"

    def _handle_comp(self, packet: GuestPacket, number: int) -> None:
        """By its address the context is found: one that is none panics the kernel."""
        transaction = packet.transaction_id
        if transaction == _XACT:
            self._answers[transaction] = packet.payload
        elif transaction != SENDCTX_NONE:
            assert _TXD < transaction <= _TXD + self._txd
            self.done.append((number, transaction))

    def _handle_rxbuf(self, packet: GuestPacket, number: int, channel: GuestChannel) -> None:
        assert struct.unpack_from("<I", packet.payload)[0] == 107
        memory = Rxbuf(self.guest.memory, self.rxbuf[0] * PAGE_SIZE, len(self.rxbuf) * PAGE_SIZE)
        frames, others = memory.take(packet.header, number)
        self.frames += frames
        for message in others:
            if struct.unpack_from("<I", message)[0] == 7:
                self._rx_status(message)
            else:
                self._controls.append(message)
        acknowledgement = self._nvs(struct.pack("<II", 108, 1))
        assert channel.write(acknowledgement, packet_type=11, transaction_id=packet.transaction_id)

    def _rx_status(self, message: bytes) -> None:
        assert len(message) >= 20
        if struct.unpack_from("<I", message, 8)[0] in (0x4001000B, 0x4001000C):
            self.link_changes += 1
