"""What FreeBSD's driver does otherwise than Linux's, played through in its order.

Source: ``sys/dev/hyperv/netvsc`` of FreeBSD 14: ``hn_nvs.c``, ``hn_rndis.c`` and ``if_hnreg.h``.
"""

from __future__ import annotations

import struct

from hvhost.network.frame import NO_OFFLOAD
from simulated.frames import ethernet
from simulated.netvsc import MAC, PEER, NetvscDriver, nvsp, rndis_packet

HN_NVS_CHIM_SIG = 0xFACE
NDIS_OFFLOAD_SIZE_6_0, NDIS_RSS_CAPS_SIZE_6_0 = 112, 16
KEY = bytes(range(40))


def attached(channels: int = 1) -> NetvscDriver:
    """hn_nvs_attach() and hn_rndis_attach()."""
    driver = NetvscDriver(queues=4)
    driver.open()
    assert driver.negotiate(0x60001) == 0x60001
    driver.tell(nvsp(125, 1500 + 14, 0, 0x8, 0))  # VLAN; first, as hn_nvs_conf_ndis() comes first
    driver.tell(nvsp(100, 6, 30))
    driver.lend_buffers(HN_NVS_CHIM_SIG)
    said = driver.request(2, struct.pack("<III", 1, 0, 2048))
    # Behind the status: version, flags, medium, packets and bytes of a transfer, alignment.
    packets, size, align = struct.unpack_from("<III", said, 20)
    assert packets and size and align < 32
    return driver


def test_the_order_of_its_attachment() -> None:
    driver = attached()
    question = struct.pack("<BBH", 0xA7, 3, 156).ljust(156, b"\0")
    status, caps = driver.query(0xFC01020D, question)
    kind, revision, size = struct.unpack_from("<BBH", caps)
    assert (status, kind) == (0, 0xA7) and revision >= 1
    assert NDIS_OFFLOAD_SIZE_6_0 <= size <= len(caps)
    encapsulation, largest, segments = struct.unpack_from("<III", caps, 80)
    assert encapsulation & 2 and segments == 2, "ndis_lsov2 of IPv4, over Ethernet"
    assert 60_000 < largest <= 65_535
    assert driver.query(0x01010101) == (0, MAC)
    assert driver.query(0x00010114) == (0, bytes(4)), "connected"
    status, caps = driver.query(0x00010203, struct.pack("<BBH", 0x88, 2, 20).ljust(20, b"\0"))
    kind, revision, size = struct.unpack_from("<BBH", caps)
    assert (status, kind) == (0, 0x88) and revision >= 1
    assert NDIS_RSS_CAPS_SIZE_6_0 <= size <= len(caps)
    messages, rings = struct.unpack_from("<II", caps, 8)
    assert messages >= 1 and rings == 4


def test_sub_channels_and_its_scaling() -> None:
    """One sub-channel less than rings; then a table of them, its key behind it."""
    driver = attached()
    assert driver.open_subchannels(3) == 3
    assert driver.set_rss([number % 4 for number in range(128)], KEY) == 0
    scaling = driver.adapter.state.scaling
    assert (set(scaling.table), scaling.key) == ({0, 1, 2, 3}, KEY)


def test_its_filters_and_frames() -> None:
    """hn_set_rxfilter() asks for all groups once there are any; it gives no list of them."""
    driver = attached()
    group = ethernet(0x1234, bytes(50), to=bytes.fromhex("01005e000001"), sender=PEER)
    for filters, expected in ((0x09, []), (0x0D, [group]), (0x20, [group])):
        assert driver.set(0x1010E, struct.pack("<I", filters)) == 0
        driver.wire.incoming.append(NO_OFFLOAD + group)
        assert [each.data for each in driver.pull()] == expected
    frame = ethernet(0x1234, bytes(60))
    driver.send(rndis_packet(frame))
    assert [each[len(NO_OFFLOAD) :] for each in driver.wire.sent] == [frame]
    assert not driver.guest.faults
