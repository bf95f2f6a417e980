"""The control side by itself: each request, each question and each thing it refuses."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.errors import RemoteProtocolError
from hvhost.network.control import ControlSide
from hvhost.network.protocol import Capability, NvspVersion
from hvhost.network.state import AdapterState

MAC = bytes.fromhex("00155d010203")
OTHER = bytes.fromhex("00155d0a0b0c")
SUCCESS, FAILURE, NOT_SUPPORTED = 0, 0xC0000001, 0xC00000BB
INVALID_LENGTH, INVALID_DATA = 0xC0010014, 0xC0010015


class Control:
    """A control side, and how often it said that something changed."""

    def __init__(self, *, initialized: bool = True, may_change_mac: bool = False) -> None:
        self.state = AdapterState(MAC, version=NvspVersion.V61, capabilities=Capability.RSC)
        self.changes = 0
        self.side = ControlSide(
            self.state,
            mac=MAC,
            name="net7",
            queues=4,
            may_change_mac=may_change_mac,
            changed=self._changed,
        )
        if initialized:
            answer = self.say(2, struct.pack("<III", 1, 0, 0x4000))
            assert answer is not None and struct.unpack_from("<II", answer) == (0, 1)

    def _changed(self) -> None:
        self.changes += 1

    def say(self, kind: int, body: bytes = b"") -> bytes | None:
        """A request; the answer behind its id."""
        answer = self.side.answer(struct.pack("<III", kind, 12 + len(body), 99) + body)
        if answer is None:
            return None
        answered, length = struct.unpack_from("<II", answer)
        assert (answered, length) == (kind | 1 << 31, len(answer))
        return answer[8:] if kind == 6 else self._of(answer)

    @staticmethod
    def _of(answer: bytes) -> bytes:
        assert struct.unpack_from("<I", answer, 8) == (99,)
        return answer[12:]

    def query(self, oid: int, data: bytes = b"") -> tuple[int, bytes]:
        answer = self.say(4, struct.pack("<IIII", oid, len(data), 20, 0) + data)
        assert answer is not None
        status, length, offset = struct.unpack_from("<III", answer)
        assert (offset, len(answer)) == (16, 12 + length)
        return status, answer[12:]

    def set(self, oid: int, data: bytes) -> int:
        answer = self.say(5, struct.pack("<IIII", oid, len(data), 20, 0) + data)
        assert answer is not None
        (status,) = struct.unpack("<I", answer)
        return int(status)


def test_a_guest_that_is_alive_is_told_so() -> None:
    control = Control(initialized=False)
    assert control.say(8) == struct.pack("<I", SUCCESS)
    assert not control.state.initialized and not control.changes


def test_a_reset_forgets_the_filter() -> None:
    control = Control()
    assert control.set(0x1010E, struct.pack("<I", 0xB)) == SUCCESS
    assert control.say(6) == struct.pack("<II", SUCCESS, 1), "addresses have to be set again"
    assert control.state.filter == 0 and control.state.initialized and control.changes == 2
    control.set(MULTICAST_LIST, GROUPS)
    control.say(6)
    assert not control.state.multicast


def test_a_halt_is_not_answered_and_ends_it() -> None:
    control = Control()
    control.set(0x1010E, struct.pack("<I", 0xB))
    assert control.say(3) is None
    assert control.state.filter == 0 and control.changes == 2
    with pytest.raises(RemoteProtocolError, match="QUERY came before INITIALIZE"):
        control.query(0x10106)


@pytest.mark.parametrize(("kind", "name"), [(4, "QUERY"), (5, "SET")])
def test_nothing_is_asked_before_the_beginning(kind: int, name: str) -> None:
    control = Control(initialized=False)
    with pytest.raises(RemoteProtocolError, match=f"{name} came before INITIALIZE"):
        control.say(kind, struct.pack("<IIII", 0x1010E, 4, 20, 0) + bytes(4))
    assert control.changes == 0


@pytest.mark.parametrize("kind", [1, 7, 0x80000002, 0x80000004, 0x80000005, 0x80000008])
def test_what_is_for_hosts_to_send(kind: int) -> None:
    with pytest.raises(RemoteProtocolError, match="is for hosts to send"):
        Control().say(kind, struct.pack("<IIII", 0x10106, 0, 20, 0))


@pytest.mark.parametrize("kind", [2, 4, 5])
def test_a_request_cut_short(kind: int) -> None:
    with pytest.raises(RemoteProtocolError, match="cut it short"):
        Control().say(kind, bytes(11))


def test_each_object_that_is_listed_is_known() -> None:
    control = Control()
    status, listed = control.query(0x10101)
    assert status == SUCCESS
    oids = struct.unpack(f"<{len(listed) // 4}I", listed)
    assert len(set(oids)) == len(oids) == 32
    for oid in oids:
        answered = control.query(oid)[0] == SUCCESS
        may_be_set = control.set(oid, b"") != NOT_SUPPORTED
        assert answered or may_be_set, f"{oid:#x}"
    assert control.query(0x10100) == (NOT_SUPPORTED, b"")
    assert control.set(0x10100, b"") == NOT_SUPPORTED


def test_who_the_adapter_is() -> None:
    control = Control(may_change_mac=True)
    assert control.query(0x1010D) == (SUCCESS, b"Hyper-V Virtual Ethernet Adapter\0")
    assert control.query(0x20216) == (SUCCESS, "net7".encode("utf-16-le"))
    assert control.query(0x1010C) == (SUCCESS, bytes.fromhex("00155d00"))
    assert configure(control, OTHER.hex()) == SUCCESS
    assert control.query(0x1010101) == (SUCCESS, MAC)
    assert control.query(0x1010102) == (SUCCESS, OTHER)
    assert control.query(0x1010103) == (SUCCESS, b""), "no list of multicast addresses is kept"
    assert control.set(0x1010103, bytes(6)) == SUCCESS


def test_counters_are_cut_to_their_words() -> None:
    control = Control()
    control.state.counters.received = 0x1_0000_0005
    assert control.query(0x20102) == (SUCCESS, struct.pack("<I", 5))


@pytest.mark.parametrize("oid", [0xFC01020B, 0xFC01020D])
def test_a_question_that_does_not_say_what_it_knows(oid: int) -> None:
    control = Control()
    for question in (b"", b"\xa7"):
        assert control.query(oid, question)[1][:4] == struct.pack("<BBH", 0xA7, 1, 112)
    assert control.query(oid, b"\xa7\2")[1][:4] == struct.pack("<BBH", 0xA7, 2, 144)


def test_a_filter_is_a_word() -> None:
    control = Control()
    assert control.set(0x1010E, bytes(3)) == INVALID_LENGTH and control.state.filter == 0
    assert control.set(0x1010E, b"\x0b\0\0\0\xff") == SUCCESS and control.state.filter == 0xB


MULTICAST_LIST = 0x1010103
GROUPS = bytes.fromhex("01005e000001 333300000001")


def test_multicast_addresses_are_whole_and_not_too_many() -> None:
    control = Control()
    assert control.query(MULTICAST_LIST) == (SUCCESS, b"")
    assert control.set(MULTICAST_LIST, GROUPS) == SUCCESS
    assert control.query(MULTICAST_LIST) == (SUCCESS, GROUPS)
    assert control.set(MULTICAST_LIST, GROUPS[1:]) == INVALID_LENGTH
    (limit,) = struct.unpack("<I", control.query(0x1010104)[1])
    many = b"".join(b"\1\0\x5e" + number.to_bytes(3, "big") for number in range(limit + 1))
    assert control.set(MULTICAST_LIST, many) == 0xC0010009, "NDIS_STATUS_MULTICAST_FULL"
    assert control.query(MULTICAST_LIST) == (SUCCESS, GROUPS), "it is as it was"
    assert control.set(MULTICAST_LIST, many[6:]) == SUCCESS
    assert len(control.state.multicast) == limit
    assert control.set(MULTICAST_LIST, b"") == SUCCESS and not control.state.multicast


def parameters(rsc: int) -> bytes:
    return bytes((0x80, 3, 32, 0)) + bytes(18) + bytes((rsc, rsc)) + bytes(8)


def test_merging_is_for_who_can_take_it() -> None:
    control = Control()
    assert control.set(0xFC01020C, parameters(2)) == SUCCESS and control.state.merging
    assert control.set(0xFC01020C, parameters(0)) == SUCCESS and control.state.merging
    assert control.set(0xFC01020C, parameters(1)) == SUCCESS and not control.state.merging
    assert control.set(0xFC01020C, bytes(14)) == INVALID_DATA
    for version, capabilities in (
        (NvspVersion.V6, Capability.RSC),
        (NvspVersion.V61, ~Capability.RSC),
        (None, Capability.RSC),
    ):
        control.state.version, control.state.capabilities = version, capabilities
        assert control.set(0xFC01020C, parameters(2)) == SUCCESS and not control.state.merging
        assert control.query(0xFC01020D, b"\xa7\3")[1][144:146] == b"\0\0"


def test_scaling_knows_the_channels_there_are() -> None:
    control = Control()
    control.state.subchannels = 1

    def table(*channels: int) -> bytes:
        head = (0x89, 2, 40, 0, 0, 0x1701, 4 * len(channels), 0, 40, 40, 0, 40 + 4 * len(channels))
        words = struct.pack(f"<{len(channels)}I", *channels)
        return struct.pack("<BBHHHIHHIHHI12x", *head) + words + bytes(40)

    assert control.set(0x10204, table(0, 1)) == SUCCESS and control.state.scaling.table == (0, 1)
    assert control.set(0x10204, table(0, 2)) == INVALID_DATA
    assert control.state.scaling.table == (0, 1)


def configure(control: Control, value: str, name: str = "NetworkAddress") -> int:
    texts = [text.encode("utf-16-le") for text in (name, value)]
    first, second = map(len, texts)
    head = struct.pack("<IIIII", 20, first, 2, 20 + first, second)
    return control.set(0x1021B, head + b"".join(texts))


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (OTHER.hex(), SUCCESS),
        (OTHER.hex() + "\0", SUCCESS),
        ("", INVALID_DATA),
        ("00155d0a0b", INVALID_DATA),
        ("00155d0a0b0c0d", INVALID_DATA),
        ("00155d0a0bxx", INVALID_DATA),
        ("00155d0a0b0", INVALID_DATA),
        ("01155d0a0b0c", INVALID_DATA),
        ("ffffffffffff", INVALID_DATA),
        ("000000000000", INVALID_DATA),
    ],
)
def test_addresses_an_adapter_can_have(value: str, status: int) -> None:
    control = Control(may_change_mac=True)
    assert configure(control, value) == status
    assert control.state.mac == (OTHER if status == SUCCESS else MAC)


def test_the_address_is_the_only_parameter_and_stays_where_it_must() -> None:
    control = Control(may_change_mac=True)
    assert configure(control, OTHER.hex(), "NetworkAddresses") == NOT_SUPPORTED
    assert configure(control, OTHER.hex(), "NetworkAddress\0") == SUCCESS
    control = Control()
    assert configure(control, OTHER.hex()) == FAILURE and control.state.mac == MAC
    assert configure(control, MAC.hex()) == SUCCESS, "it has that one"
    assert control.set(0x1021B, bytes(19)) == INVALID_DATA


@given(st.integers(0, 9), st.binary(max_size=80))
def test_any_message_is_answered_or_a_violation(kind: int, body: bytes) -> None:
    control = Control()
    try:
        answer = control.side.answer(struct.pack("<II", kind, 8 + len(body)) + body)
    except RemoteProtocolError:
        return
    assert answer is None if kind == 3 else answer is not None
    assert len(control.state.mac) == 6
