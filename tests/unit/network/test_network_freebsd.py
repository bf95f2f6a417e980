"""FreeBSD's driver against our adapter, in memory: its messages, sizes, order and checks.

Source: see :mod:`simulated.hn`. What it asks of the bus is in the tests of VMBus.
"""

from __future__ import annotations

import struct

import pytest

from hvhost.network import frame
from hvhost.network.frame import NO_OFFLOAD
from hvhost.network.toeplitz import toeplitz
from simulated.frames import ethernet, ones_sum, sums_are_right, tcp
from simulated.hn import HN_CHIM_SIZE, HN_NVS_VERSIONS, HnDriver
from simulated.hn_frames import lso, txcsum
from simulated.netvsc import MAC, PEER, Received, rndis_packet

#: hn_rss_key_default, which is Microsoft's example.
KEY = bytes.fromhex(
    "6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa"
)
CAPS = {"TSO4", "TSO6", "IPCS", "TCP4CS", "UDP4CS", "TCP6CS", "UDP6CS", "HASHVAL"}
UP = 0x0D  # NDIS_PACKET_TYPE_DIRECTED, _BROADCAST, _ALL_MULTICAST
IPV4, IPV6, TCPCS, UDPCS, IPCS = 1, 2, 4, 8, 16  # NDIS_TXCSUM_INFO_*


def attached(**options: int) -> HnDriver:
    driver = HnDriver(**options)  # type: ignore[arg-type]
    driver.synth_attach(1500, KEY)
    return driver


def running(**options: int) -> HnDriver:
    driver = attached(**options)
    driver.set_rxfilter(UP)
    return driver


def received(driver: HnDriver, *frames: bytes, offload: bytes = NO_OFFLOAD) -> list[Received]:
    driver.wire.incoming.extend(offload + each for each in frames)
    return driver.pull()


def unmade(payload: bytes, *, ipv6: bool = False, protocol: int = 6, tso: bool = False) -> bytes:
    """A frame as its stack gives it to the driver: the sums left out, for TSO the lengths too."""
    made = bytearray(tcp(payload, ipv6=ipv6, protocol=protocol, good=False))
    start, addresses = (54, made[22:54]) if ipv6 else (34, made[26:34])
    length = 0 if tso else len(made) - start
    struct.pack_into(
        "!H",
        made,
        start + (16 if protocol == 6 else 6),
        ones_sum(bytes(addresses) + struct.pack("!II", length, protocol)),
    )
    if not ipv6:
        made[24:26] = bytes(2)
    if tso:
        place = 18 if ipv6 else 16
        made[place : place + 2] = bytes(2)
    return bytes(made)


def on_the_wire(driver: HnDriver) -> list[bytes]:
    """The frames sent, segmented and summed as their offload headers say."""
    sent, driver.wire.sent = driver.wire.sent, []
    found: list[bytes] = []
    for each in sent:
        offload = frame.unpack_offload(each[: len(NO_OFFLOAD)])
        found += map(bytes, frame.segments(each[len(NO_OFFLOAD) :], offload))
    return found


@pytest.mark.parametrize(
    ("queues", "rings", "channels"), [(4, 4, 4), (2, 4, 2), (4, 2, 2), (1, 4, 1), (4, 1, 1)]
)
def test_its_attachment(queues: int, rings: int, channels: int) -> None:
    driver = attached(queues=queues, rings=rings)
    assert (driver.version, driver.caps) == (0x60001, CAPS)
    assert driver.rndis_get(0x01010101, 6) == MAC
    assert driver.rndis_get(0x00010106, 4) == struct.pack("<I", 1500)
    assert driver.linkstatus()
    state = driver.adapter.state
    assert (state.mtu, state.filter, state.merging) == (1500, 0, False)
    assert len(driver.channels) == channels
    if channels > 1:
        scaling = state.scaling
        assert scaling.table == tuple(number % channels for number in range(128))
        assert (scaling.key, scaling.hash_types) == (KEY, 0x1700)
    assert (driver.agg_pkts, driver.agg_align) == (8, 8) and driver.agg_size >= driver.chim_szmax
    assert driver.guest.faults == []


def test_buffers_and_rings_of_its_own_size() -> None:
    driver = running(rxbuf_size=31 << 20, chim_size=HN_CHIM_SIZE, ring_pages=128)
    assert driver.chim_cnt * driver.chim_szmax == HN_CHIM_SIZE, "it discards what is left over"
    data = ethernet(0x1234, bytes(60))
    driver.txpkt_chim([rndis_packet(data, (8, 0))], section=driver.chim_cnt - 1)
    assert on_the_wire(driver) == [data]
    data = ethernet(0x1234, bytes(60), to=MAC, sender=PEER)
    assert [each.data for each in received(driver, data)] == [data]
    driver.synth_detach()
    assert driver.guest.faults == []


@pytest.mark.parametrize(
    ("versions", "taken", "channels"),
    [
        (HN_NVS_VERSIONS[2:], 0x50000, 4),  # up to 13.0
        (HN_NVS_VERSIONS[3:], 0x40000, 1),  # its NDIS 6.1 knows no receive scaling
        (HN_NVS_VERSIONS[4:], 0x30002, 1),
        (HN_NVS_VERSIONS[5:], 0x00002, 1),  # tells no MTU
    ],
)
def test_older_ones(versions: tuple[int, ...], taken: int, channels: int) -> None:
    """Shorter messages, a longer ``struct ndis_offload``, and nothing of merged segments."""
    driver = HnDriver(versions=versions, message_size=32, offload_size=168)
    driver.synth_attach(1500, KEY)
    driver.set_rxfilter(UP)
    assert driver.version == taken and len(driver.channels) == channels
    assert driver.caps == (CAPS if taken >= 0x50000 else CAPS - {"HASHVAL"})
    data = tcp(b"x" * 1460, to=MAC, sender=PEER)
    assert [each.data for each in received(driver, data)] == [data]
    driver.txpkt_chim([rndis_packet(unmade(b"y" * 100), txcsum(34, IPV4 | IPCS | TCPCS))])
    (sent,) = on_the_wire(driver)
    assert sent[54:] == b"y" * 100 and sums_are_right(sent)
    driver.synth_detach()
    assert driver.guest.faults == []


def test_another_mtu_is_another_attachment() -> None:
    """hn_ioctl(SIOCSIFMTU): all is taken down, to the last channel, and built up again."""
    driver = running()
    large = tcp(b"x" * 8960, to=MAC, sender=PEER)
    assert received(driver, large) == []
    driver.synth_detach()
    assert not driver.adapter.is_open and driver.adapter.state.version is None
    driver.synth_attach(9000, KEY)
    assert driver.rndis_get(0x00010106, 4) == struct.pack("<I", 9000)
    driver.set_rxfilter(UP)
    assert [each.data for each in received(driver, large)] == [large]
    assert len(driver.channels) == 4 and driver.guest.faults == []
    # TSO wants two segments at least: with an MTU beyond that it does without.
    driver.synth_detach()
    driver.caps = None
    driver.synth_attach(40_000, KEY)
    assert driver.caps == CAPS - {"TSO4", "TSO6"} and driver.guest.faults == []


def test_what_it_sends_together() -> None:
    driver = running()
    frames = [ethernet(0x1234, bytes((number,)) * (50 + number)) for number in range(8)]
    messages = [rndis_packet(each, (8, 3)) for each in frames]
    transaction = driver.txpkt_chim(messages, ring=3, section=5)
    driver.read()
    assert on_the_wire(driver) == frames
    assert driver.done == [(3, transaction)], "once, and on the ring that it came from"


@pytest.mark.parametrize("ipv6", [False, True])
@pytest.mark.parametrize("vlan", [None, 77])
def test_what_it_leaves_to_be_segmented(ipv6: bool, vlan: int | None) -> None:
    driver = running()
    payload = bytes(number % 251 for number in range(40_000))
    start = 54 if ipv6 else 34
    data = unmade(payload, ipv6=ipv6, tso=True)
    tag = [] if vlan is None else [(6, vlan << 4 | 5)]
    message = rndis_packet(data, (8, 1), *tag, lso(start, 1400, ipv6=ipv6))
    head, rest = message[: -len(data)], data
    pieces = [rest[: start + 20]]
    rest = rest[start + 20 :]
    while rest:
        pieces.append(rest[:2048])  # clusters
        rest = rest[2048:]
    transaction = driver.txpkt_sglist(head, pieces, ring=1)
    driver.read()
    found = on_the_wire(driver)
    if vlan is not None:
        assert {each[12:16] for each in found} == {b"\x81\0" + (5 << 13 | vlan).to_bytes(2, "big")}
        found = [each[:12] + each[16:] for each in found]
    assert all(map(sums_are_right, found)) and len(found) == 29
    assert b"".join(each[start + 20 :] for each in found) == payload
    assert driver.done == [(1, transaction)]


@pytest.mark.parametrize(
    ("ipv6", "protocol", "flags"),
    [
        (False, 6, IPV4 | IPCS | TCPCS),
        (False, 17, IPV4 | IPCS | UDPCS),
        (True, 6, IPV6 | TCPCS),
        (True, 17, IPV6 | UDPCS),
    ],
)
def test_sums_that_it_leaves_to_be_made(ipv6: bool, protocol: int, flags: int) -> None:
    driver = running()
    data = unmade(b"payload", ipv6=ipv6, protocol=protocol)
    assert not sums_are_right(data)
    driver.txpkt_chim([rndis_packet(data, (8, 0), txcsum(54 if ipv6 else 34, flags))])
    (sent,) = on_the_wire(driver)
    assert sums_are_right(sent) and sent[-7:] == b"payload"


def test_its_filters() -> None:
    """hn_rxfilter_config() asks for all groups once there are any; it gives no list of them."""
    driver = attached()
    group = ethernet(0x1234, bytes(50), to=bytes.fromhex("01005e000001"), sender=PEER)
    others = ethernet(0x1234, bytes(50), to=PEER, sender=PEER)
    for filters, expected in ((0x00, []), (0x09, []), (0x0D, [group]), (0x20, [group, others])):
        driver.set_rxfilter(filters)
        assert [each.data for each in received(driver, group, others)] == expected


@pytest.mark.parametrize("ipv6", [False, True])
def test_flows_come_on_the_ring_that_its_key_and_table_say(ipv6: bool) -> None:
    driver = running()
    rings = set()
    for port in range(1000, 1040):
        data = tcp(b"x", ipv6=ipv6, ports=(port, 80), to=MAC, sender=PEER)
        (got,) = received(driver, data)
        value = toeplitz(KEY, data[22:58] if ipv6 else data[26:38])
        assert (got.data, got.infos[8], got.channel) == (data, value, value & 127 & 3)
        # NDIS_HASH_FUNCTION_TOEPLITZ of NDIS_HASH_TCP_IPV6 or …IPV4: without, it has no use for it.
        assert got.infos[9] == (0x1001 if ipv6 else 0x201)
        rings.add(got.channel)
    assert rings == {0, 1, 2, 3}
    data = tcp(b"x", ipv6=ipv6, protocol=17, to=MAC, sender=PEER)
    (got,) = received(driver, data)
    assert got.infos[8] == toeplitz(KEY, data[22:54] if ipv6 else data[26:34])
    assert got.infos[9] == (0x401 if ipv6 else 0x101), "by addresses alone"
    (got,) = received(driver, ethernet(0x1234, bytes(50), to=MAC, sender=PEER))
    assert (got.infos, got.channel) == ({}, 0)


def test_merged_segments_are_for_who_switched_them_on() -> None:
    """hw.hn.…rsc_switch is off at first; hn_rndis_reconf_offload() once it is set."""
    driver = running()
    parts = [bytes((number,)) * 1448 for number in range(1, 6)]
    segments = [
        tcp(part, sequence=7 + 1448 * number, flags=0x10, to=MAC, sender=PEER)
        for number, part in enumerate(parts)
    ]
    assert [each.data for each in received(driver, *segments)] == segments
    driver.rsc = True
    driver.rndis_conf_offload(1500)
    (merged,) = received(driver, *segments)
    assert merged.fragments == 5 and merged.data[54:] == b"".join(parts)
    assert merged.infos[0] == 8, "NDIS_RXCSUM_INFO_TCPCS_OK"
    driver.rsc = False
    driver.rndis_conf_offload(1500)
    assert [each.data for each in received(driver, *segments)] == segments


def test_a_segment_from_the_host_as_large_as_it_comes() -> None:
    """64 KiB that nobody has segmented or summed: whole with RSC, else in frames of its MTU."""
    driver = running()
    payload = bytes(number % 253 for number in range(60_000))
    large = tcp(payload, flags=0x10, to=MAC, sender=PEER)
    offload = frame.Offload(frame.NEEDS_CSUM, frame.GSO_TCPV4, 54, 1448, 34, 16).pack()
    pieces = received(driver, large, offload=offload)
    assert len(pieces) == 42 and all(sums_are_right(each.data) for each in pieces)
    assert b"".join(each.data[54:] for each in pieces) == payload
    driver.rsc = True
    driver.rndis_conf_offload(1500)
    (whole,) = received(driver, large, offload=offload)
    assert whole.data[54:] == payload and whole.infos[0] == 8


def test_a_tag_comes_beside_its_frame() -> None:
    driver = running()
    data = tcp(b"x" * 100, to=MAC, sender=PEER)
    tagged = data[:12] + b"\x81\0" + (3 << 13 | 42).to_bytes(2, "big") + data[12:]
    (got,) = received(driver, tagged)
    assert (got.data, got.infos[6]) == (data, 42 << 4 | 3)


def test_it_asks_for_the_link_once_it_is_told_of_a_change() -> None:
    driver = running()
    for number, up in enumerate((False, True), 1):
        driver.adapter.set_link(up)
        driver.read()
        assert driver.link_changes == number and driver.linkstatus() == up
    assert driver.guest.faults == []
