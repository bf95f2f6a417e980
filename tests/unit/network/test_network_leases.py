"""DHCP and DNS of networks without an uplink: as clients ask, as nobody should, and for real."""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvhost.errors import HvHostError
from hvhost.network import switch_client
from hvhost.network.config import parse_adapter
from hvhost.network.leases import LEASE_LIMIT, Leases, Reply, resolve
from hvhost.network.namespace import open_namespace
from hvhost.network.switch_client import Hello, SwitchConfig
from hvhost.verify.wire import Witness
from simulated.dhcp_client import lease

OWN = ipaddress.IPv4Interface("192.168.77.1/24")
DISCOVER, OFFER, REQUEST, ACK, NAK, RELEASE, INFORM = 1, 2, 3, 5, 6, 7, 8


def message(
    kind: int, client: int = 1, *options: tuple[int, bytes], current: str = "0.0.0.0", op: int = 1
) -> bytes:
    hardware = client.to_bytes(6, "big").ljust(16, b"\0")
    fixed = struct.pack("!BBBBIHH", op, 1, 6, 0, 0x1234, 0, 0)
    fixed += socket.inet_aton(current) + bytes(12) + hardware
    tail = b"".join(
        bytes((code, len(data))) + data for code, data in ((53, bytes((kind,))), *options)
    )
    return fixed.ljust(236, b"\0") + bytes((99, 130, 83, 99)) + tail + b"\xff"


def told(reply: Reply | None) -> tuple[int, str, dict[int, bytes]]:
    """Kind, address and options of an answer."""
    assert reply is not None
    data = reply.data
    assert data[0] == 2 and data[4:8] == bytes.fromhex("00001234") and data[236:240] == b"c\x82Sc"
    options, position = {}, 240
    while data[position] != 255:
        options[data[position]] = data[position + 2 : position + 2 + data[position + 1]]
        position += 2 + data[position + 1]
    return options[53][0], socket.inet_ntoa(data[16:20]), options


def test_a_client_gets_an_address_and_keeps_it() -> None:
    leases = Leases(OWN)
    kind, address, options = told(leases.answer(message(DISCOVER)))
    assert (kind, address) == (OFFER, "192.168.77.2")
    assert options[1] == socket.inet_aton("255.255.255.0")
    assert options[6] == options[54] == OWN.ip.packed and 3 not in options
    wish = (50, socket.inet_aton(address)), (54, OWN.ip.packed), (12, b"Web")
    assert told(leases.answer(message(REQUEST, 1, *wish)))[:2] == (ACK, address)
    renewed = leases.answer(message(REQUEST, current=address))
    assert told(renewed)[:2] == (ACK, address) and renewed is not None and renewed.to == address
    assert told(leases.answer(message(DISCOVER)))[1] == address
    assert told(leases.answer(message(DISCOVER, 2)))[1] == "192.168.77.3"


def test_a_wish_is_granted_unless_it_is_another_s_or_outside() -> None:
    leases = Leases(OWN)

    def asked(client: int, wish: str) -> tuple[int, str]:
        return told(leases.answer(message(REQUEST, client, (50, socket.inet_aton(wish)))))[:2]

    assert asked(1, "192.168.77.50") == (ACK, "192.168.77.50")
    for client, taken in enumerate(
        ("192.168.77.50", "192.168.77.1", "192.168.77.255", "192.168.77.0", "10.0.0.5"), 2
    ):
        assert asked(client, taken) == (NAK, "0.0.0.0")


def test_padding_between_options_means_nothing() -> None:
    plain = message(REQUEST, 1, (50, socket.inet_aton("192.168.77.9")), (12, b"web"))
    padded = plain[:243] + bytes(3) + plain[243:]  # behind the message's kind
    assert told(Leases(OWN).answer(padded)) == told(Leases(OWN).answer(plain))
    assert told(Leases(OWN).answer(padded))[:2] == (ACK, "192.168.77.9")


def test_a_network_without_room_gives_out_nothing() -> None:
    leases = Leases(ipaddress.IPv4Interface("10.0.0.1/32"))
    for kind in (DISCOVER, REQUEST):
        answer = leases.answer(message(kind, 1, (50, socket.inet_aton("10.0.0.2")), (12, b"web")))
        assert answer is None or told(answer)[0] == NAK
    assert leases.names == {"host": leases.own}


def test_what_is_let_go_is_free_again_and_questions_alone_cost_nothing() -> None:
    leases = Leases(OWN)
    assert told(leases.answer(message(DISCOVER)))[1] == "192.168.77.2"
    assert leases.answer(message(RELEASE)) is None
    assert told(leases.answer(message(DISCOVER, 2)))[1] == "192.168.77.2"
    inform = leases.answer(message(INFORM, 3, current="192.168.77.99"))
    kind, address, options = told(inform)
    assert (kind, address) == (ACK, "0.0.0.0") and 51 not in options
    assert inform is not None and inform.to == "192.168.77.99"


def test_a_flood_of_clients_takes_no_more_than_there_is() -> None:
    leases = Leases(ipaddress.IPv4Interface("10.0.0.1/8"))
    for client in range(1, 3 * LEASE_LIMIT):
        told(leases.answer(message(DISCOVER, client)))
    assert len(leases._leases) == LEASE_LIMIT
    small = Leases(ipaddress.IPv4Interface("10.0.0.1/30"))
    assert told(small.answer(message(DISCOVER, 1)))[1] == "10.0.0.2"
    assert told(small.answer(message(DISCOVER, 2)))[1] == "10.0.0.2"
    assert Leases(ipaddress.IPv4Interface("10.0.0.1/32")).answer(message(DISCOVER)) is None


@pytest.mark.parametrize(
    "wrong",
    [
        message(DISCOVER)[:239],
        message(DISCOVER, op=2),
        message(4),
        message(DISCOVER, 1, (54, bytes((10, 0, 0, 1)))),
        message(DISCOVER)[:-1] + bytes((12, 200)),
        message(DISCOVER)[:240] + b"\xff",
        message(DISCOVER)[:236] + b"none" + message(DISCOVER)[240:],
    ],
)
def test_what_is_not_for_us_gets_no_answer(wrong: bytes) -> None:
    assert Leases(OWN).answer(wrong) is None


def query(name: str, kind: int = 1, flags: int = 0x100) -> bytes:
    labels = b"".join(bytes((len(each),)) + each.encode() for each in name.split("."))
    return struct.pack("!6H", 7, flags, 1, 0, 0, 0) + labels + struct.pack("!BHH", 0, kind, 1)


def test_names() -> None:
    leases = Leases(OWN)
    leases.answer(message(DISCOVER, 1, (12, b"Web")))
    leases.answer(message(DISCOVER, 2, (12, b"host")))
    leases.answer(message(DISCOVER, 3, (12, b"bad name")))
    assert leases.names == {"host": OWN.ip, "web": ipaddress.IPv4Address("192.168.77.2")}
    for name, address in (("host", "192.168.77.1"), ("WEB", "192.168.77.2")):
        answer = resolve(query(name), leases.names)
        assert answer is not None and answer[-4:] == socket.inet_aton(address)
        assert struct.unpack_from("!HHHH", answer) == (7, 0x8500, 1, 1)
    for name, kind, code, count in (("nobody", 1, 3, 0), ("a.b", 1, 3, 0), ("host", 28, 0, 0)):
        answer = resolve(query(name, kind), leases.names)
        assert answer is not None
        assert struct.unpack_from("!HHHH", answer) == (7, 0x8500 | code, 1, count)
    assert resolve(query("host", flags=0x8000), leases.names) is None
    assert resolve(query("host")[:-1], leases.names) is None
    assert resolve(query("x" * 64), {"x" * 64: OWN.ip}) is None  # no label is so long
    plain = query("host")
    for wrong in (
        query("host", flags=0x1100),  # a status request
        plain[:4] + b"\0\2" + plain[6:],  # two questions
        plain[:-2] + b"\0\3",  # of another class
    ):
        answer = resolve(wrong, leases.names)
        assert answer is not None and len(answer) == len(wrong) and answer[3] & 0xF == 5


@settings(deadline=None)
@given(st.binary(max_size=400), st.binary(max_size=80))
def test_nothing_makes_it_fail(tail: bytes, question: bytes) -> None:
    leases = Leases(OWN)
    leases.answer(tail)
    leases.answer(message(REQUEST)[:240] + tail)
    resolve(question, leases.names)
    resolve(query("host")[:12] + question, leases.names)


#: Asks a server for the address of "host".
RESOLVER = """
import socket, struct, sys
dns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
dns.settimeout(10)
dns.sendto(struct.pack("!6H", 7, 256, 1, 0, 0, 0) + b"\\4host\\0" + bytes((0, 1, 0, 1)),
    (sys.argv[1], 53))
print(socket.inet_ntoa(dns.recv(500)[-4:]))
"""


@pytest.mark.parametrize("dhcp", ["", ",dhcp=off"])
def test_a_host_only_network_gives_out_addresses_and_names(
    dhcp: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HVHOST_RUNTIME_DIR", str(tmp_path))
    try:
        namespace = open_namespace([("tap0", "")])
    except HvHostError as error:
        pytest.skip(str(error))
    uplink = parse_adapter(f"host-only,address={OWN}{dhcp}", name="uplink")
    switch_client.start(SwitchConfig("lan", uplink))
    switch_client.attach("lan", Hello("tap", "guest"), namespace.descriptors[0])
    guest = Witness(namespace.pid)
    try:
        # A silence proves little on a slow computer; that nobody listens, all.
        host = Witness(int(switch_client.info("lan")["namespace_pid"]))
        ports = {line.split()[1] for line in host.command("cat", "/proc/net/udp").splitlines()[1:]}
        listened = {port for port in (67, 53) if any(e.endswith(f":{port:04X}") for e in ports)}
        assert listened == (set() if dhcp else {67, 53})
        if dhcp:
            with pytest.raises(HvHostError, match="TimeoutError"):
                lease(guest, "web", 0.5)
            return
        got = lease(guest, "web")
        assert got == {
            "address": "192.168.77.2",
            "mask": "255.255.255.0",
            "gateway": None,
            "dns": str(OWN.ip),
        }
        guest.command("ip", "address", "add", f"{got['address']}/24", "dev", "tap0")
        said = guest.command(sys.executable, "-c", RESOLVER, str(OWN.ip))
        assert said.strip() == str(OWN.ip)
        assert guest.do("ping", to=str(OWN.ip))["answers"] == 1
    finally:
        switch_client.stop("lan")
        namespace.close()
