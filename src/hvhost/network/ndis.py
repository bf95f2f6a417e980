"""NDIS objects inside RNDIS queries: offload capabilities and parameters, receive-side scaling.

Source: ``drivers/net/hyperv/hyperv_net.h`` of Linux 6.1 (``struct ndis_offload``,
``ndis_offload_params``, ``ndis_recv_scale_cap``, ``ndis_recv_scale_param``), after ``ntddndis.h``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from hvhost.errors import RemoteProtocolError
from hvhost.wire import U8, U16, U32, Record

OBJECT_TYPE_DEFAULT: Final = 0x80
OBJECT_TYPE_RSS_CAPABILITIES: Final = 0x88
OBJECT_TYPE_RSS_PARAMETERS: Final = 0x89
OBJECT_TYPE_OFFLOAD: Final = 0xA7

#: Largest frame that may be handed over for segmentation, with its headers.
LARGE_SEND_SIZE: Final = 65536 - 14 - 4
HASH_KEY_SIZE: Final = 40
INDIRECTION_ENTRIES: Final = 128

_ENCAPSULATION_8023 = 0x2
_CHECKSUM_ALL_IP4 = 0x001 | 0x004 | 0x010 | 0x040 | 0x100
_CHECKSUM_ALL_IP6 = 0x001 | 0x004 | 0x010 | 0x040
_LSO_OPTIONS_IP6 = 0x001 | 0x004

# Sizes of struct ndis_offload by revision: NDIS 6.0, 6.1, 6.30.
_OFFLOAD_SIZES: Final = {1: 112, 2: 144, 3: 156}

RSS_CAPABILITY_FLAGS: Final = 0x01000000 | 0x02000000 | 0x04000000 | 0x100 | 0x200
RSS_HASH_TOEPLITZ: Final = 1

HASH_IPV4: Final = 0x100
HASH_TCP_IPV4: Final = 0x200
HASH_IPV6: Final = 0x400
HASH_TCP_IPV6: Final = 0x1000

PARAM_FLAG_HASH_INFO_UNCHANGED: Final = 0x2
PARAM_FLAG_ITABLE_UNCHANGED: Final = 0x4
PARAM_FLAG_HASH_KEY_UNCHANGED: Final = 0x8
PARAM_FLAG_DISABLE_RSS: Final = 0x10


@dataclass(frozen=True, slots=True)
class ObjectHeader(Record):
    """``struct ndis_object_header``."""

    type: U8
    revision: U8
    size: U16


@dataclass(frozen=True, slots=True)
class Offload(Record):
    """``struct ndis_offload`` of NDIS 6.30: what the adapter can do for the guest."""

    type: U8
    revision: U8
    size: U16
    ip4_txenc: U32 = _ENCAPSULATION_8023
    ip4_txcsum: U32 = _CHECKSUM_ALL_IP4
    ip4_rxenc: U32 = _ENCAPSULATION_8023
    ip4_rxcsum: U32 = _CHECKSUM_ALL_IP4
    ip6_txenc: U32 = _ENCAPSULATION_8023
    ip6_txcsum: U32 = _CHECKSUM_ALL_IP6
    ip6_rxenc: U32 = _ENCAPSULATION_8023
    ip6_rxcsum: U32 = _CHECKSUM_ALL_IP6
    lsov1_encap: U32 = 0
    lsov1_maxsize: U32 = 0
    lsov1_minsegs: U32 = 0
    lsov1_opts: U32 = 0
    ipsecv1_encap: U32 = 0
    ipsecv1_ah_esp: U32 = 0
    ipsecv1_xport_tun: U32 = 0
    ipsecv1_ip4_opts: U32 = 0
    ipsecv1_flags: U32 = 0
    ipsecv1_ip4_ah: U32 = 0
    ipsecv1_ip4_esp: U32 = 0
    lsov2_ip4_encap: U32 = _ENCAPSULATION_8023
    lsov2_ip4_maxsz: U32 = LARGE_SEND_SIZE
    lsov2_ip4_minsg: U32 = 2
    lsov2_ip6_encap: U32 = _ENCAPSULATION_8023
    lsov2_ip6_maxsz: U32 = LARGE_SEND_SIZE
    lsov2_ip6_minsg: U32 = 2
    lsov2_ip6_opts: U32 = _LSO_OPTIONS_IP6
    flags: U32 = 0


def offload_capabilities(revision: int, *, merging: bool) -> bytes:
    """The answer to OID_TCP_OFFLOAD_HARDWARE_CAPABILITIES for a guest that knows *revision*.

    *merging*: received segments may be merged (RSC), which revision 3 can say.
    """
    revision = min(max(revision, 1), 3)
    size = _OFFLOAD_SIZES[revision]
    head = Offload(OBJECT_TYPE_OFFLOAD, revision, size).pack()
    ipsecv2 = bytes(32 if revision > 1 else 0)
    rsc = bytes((merging, merging)) if revision > 2 else b""
    return (head + ipsecv2 + rsc).ljust(size, b"\0")


@dataclass(frozen=True, slots=True)
class OffloadParameters(Record):
    """``struct ndis_offload_params`` as of NDIS 6.0; later revisions say more behind it."""

    type: U8
    revision: U8
    size: U16
    ip_v4_csum: U8
    tcp_ip_v4_csum: U8
    udp_ip_v4_csum: U8
    tcp_ip_v6_csum: U8
    udp_ip_v6_csum: U8
    lso_v1: U8
    ip_sec_v1: U8
    lso_v2_ipv4: U8
    lso_v2_ipv6: U8
    tcp_connection_ip_v4: U8
    tcp_connection_ip_v6: U8


_RSC_OFFSET = 4 + 11 + 1 + 4 + 2  # the flags word is aligned, two bytes of IPsec follow it
_RSC_ENABLED = 2
_RSC_DISABLED = 1


def merging_wanted(data: bytes) -> bool | None:
    """Whether OID_TCP_OFFLOAD_PARAMETERS switches merging on or off; ``None``: neither."""
    OffloadParameters.unpack(data)
    values = data[_RSC_OFFSET : _RSC_OFFSET + 2]
    if _RSC_ENABLED in values:
        return True
    return False if _RSC_DISABLED in values else None


@dataclass(frozen=True, slots=True)
class ReceiveScaleCapabilities(Record):
    """``struct ndis_recv_scale_cap``."""

    type: U8
    revision: U8
    size: U16
    cap_flag: U32
    num_int_msg: U32
    num_recv_que: U32
    num_indirect_tabent: U16


def receive_scale_capabilities(queues: int) -> bytes:
    """The answer to OID_GEN_RECEIVE_SCALE_CAPABILITIES of an adapter with *queues* channels."""
    return ReceiveScaleCapabilities(
        OBJECT_TYPE_RSS_CAPABILITIES,
        2,
        ReceiveScaleCapabilities.wire_size(),
        RSS_CAPABILITY_FLAGS | RSS_HASH_TOEPLITZ,
        queues,
        queues,
        INDIRECTION_ENTRIES,
    ).pack()


@dataclass(frozen=True, slots=True)
class _ReceiveScaleParameters(Record):
    """``struct ndis_recv_scale_param``, its fields aligned as C does it."""

    type: U8
    revision: U8
    size: U16
    flag: U16
    base_cpu_number: U16
    hashinfo: U32
    indirect_tabsize: U16
    padding: U16
    indirect_taboffset: U32
    hashkey_size: U16
    padding2: U16
    hashkey_offset: U32
    processor_masks_offset: U32
    num_processor_masks: U32
    processor_masks_entry_size: U32


@dataclass(frozen=True, slots=True)
class ReceiveScaling:
    """How received frames are spread: *table* of channel numbers, indexed by hash bits.

    *hash_types* are ``HASH_*``; an empty table means that all go to channel 0.
    """

    table: tuple[int, ...] = ()
    key: bytes = b""
    hash_types: int = 0


def _field(data: bytes, offset: int, size: int, what: str) -> bytes:
    if offset < _ReceiveScaleParameters.wire_size() or offset + size > len(data):
        raise RemoteProtocolError(
            f"the {what} of {size} bytes at {offset} is not inside {len(data)} bytes of "
            "receive scaling parameters."
        )
    return data[offset : offset + size]


def receive_scaling(data: bytes, now: ReceiveScaling, queues: int) -> ReceiveScaling:
    """What OID_GEN_RECEIVE_SCALE_PARAMETERS makes of *now*; *queues* channels exist."""
    head = _ReceiveScaleParameters.unpack(data)
    if head.flag & PARAM_FLAG_DISABLE_RSS:
        return ReceiveScaling(key=now.key)
    key, table, hash_types = now.key, now.table, now.hash_types
    if not head.flag & PARAM_FLAG_HASH_INFO_UNCHANGED:
        if head.hashinfo & 0xFF not in (0, RSS_HASH_TOEPLITZ):
            raise RemoteProtocolError(f"hash function {head.hashinfo & 0xFF:#x} is not offered.")
        hash_types = head.hashinfo & ~0xFF
    if not head.flag & PARAM_FLAG_HASH_KEY_UNCHANGED:
        if head.hashkey_size != HASH_KEY_SIZE:
            raise RemoteProtocolError(f"a hash key of {head.hashkey_size} bytes is not offered.")
        key = _field(data, head.hashkey_offset, head.hashkey_size, "hash key")
    if not head.flag & PARAM_FLAG_ITABLE_UNCHANGED:
        size = head.indirect_tabsize
        if not 4 <= size <= 4 * INDIRECTION_ENTRIES or size & size - 1:
            raise RemoteProtocolError(f"an indirection table of {size} bytes is not offered.")
        raw = _field(data, head.indirect_taboffset, size, "indirection table")
        table = struct.unpack(f"<{size // 4}I", raw)
        if max(table) >= queues:
            raise RemoteProtocolError(
                f"the indirection table names channel {max(table)} of {queues}."
            )
    if not key:
        raise RemoteProtocolError("receive scaling was switched on without a hash key.")
    return ReceiveScaling(table, key, hash_types)
