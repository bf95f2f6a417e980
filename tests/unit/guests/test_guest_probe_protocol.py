from __future__ import annotations

import zlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.errors import LocalProtocolError
from hvhost.guests import probe_protocol as protocol
from hvhost.guests.probe_protocol import Decoder, Ending, Message, MessageType

messages = st.builds(
    Message,
    st.sampled_from(MessageType),
    st.integers(0, 0xFFFFFFFF),
    st.binary(max_size=600) | st.integers(0, 4000).map(bytes),
)


def frame(payload: bytes) -> bytes:
    checked = payload + zlib.crc32(payload).to_bytes(4, "little")
    return b"\0" + protocol.cobs_encode(checked) + b"\0"


@given(st.binary(max_size=1100) | st.lists(st.sampled_from([b"\0", b"x" * 254])).map(b"".join))
def test_cobs_has_no_zero_and_can_be_undone(data: bytes) -> None:
    coded = protocol.cobs_encode(data)
    assert 0 not in coded
    assert len(coded) <= len(data) + len(data) // 254 + 1
    assert protocol.cobs_decode(coded) == data


@pytest.mark.parametrize("coded", [b"\x05abc", b"\x01\x00", b"\xff" + b"a" * 253])
def test_cobs_refuses_what_it_never_makes(coded: bytes) -> None:
    assert protocol.cobs_decode(coded) is None


@given(st.lists(messages, max_size=5), st.lists(st.integers(0, 20000)))
def test_messages_survive_any_splitting(sent: list[Message], cuts: list[int]) -> None:
    stream = b"".join(protocol.encode(message) for message in sent)
    edges = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    decoder = Decoder()
    got = [m for a, b in pairwise(edges) for m in decoder.feed(stream[a:b])]
    assert got == sent
    assert decoder.dropped == 0


@given(st.binary(max_size=300), messages)
def test_garbage_before_a_frame_does_not_hide_it(garbage: bytes, message: Message) -> None:
    assert list(Decoder().feed(garbage + protocol.encode(message)))[-1] == message


@given(messages, st.data())
def test_a_changed_byte_loses_the_frame_and_no_other(message: Message, data: st.DataObject) -> None:
    coded = bytearray(protocol.encode(message))
    position = data.draw(st.integers(1, len(coded) - 2))
    coded[position] ^= data.draw(st.integers(1, 255))
    follower = Message(MessageType.PONG, 7)
    got = list(Decoder().feed(bytes(coded) + protocol.encode(follower)))
    assert got == [follower]


@pytest.mark.parametrize(
    "payload",
    [
        b"p\x01\x00\x00",  # shorter than a header
        b"?\x01\x00\x00\x00",  # a type nobody knows
        b"p\x01\x00\x00\x00" + b"x" * (protocol.FRAME_MAX - 4),  # a byte too long
        b"p\x01\x00\x00\x00" + bytes(protocol.FRAME_MAX - 4),  # likewise, in fewer coded bytes
    ],
)
def test_a_well_formed_frame_of_a_bad_payload_is_dropped(payload: bytes) -> None:
    decoder = Decoder()
    assert list(decoder.feed(frame(payload))) == []
    assert decoder.dropped == 1


def test_an_endless_frame_takes_no_memory() -> None:
    decoder = Decoder()
    for _ in range(100):
        assert list(decoder.feed(b"x" * 10000)) == []
    assert len(decoder._coded) <= protocol._CODED_MAX
    message = Message(MessageType.DONE, 3, b"abc")
    assert list(decoder.feed(protocol.encode(message))) == [message]
    assert decoder.dropped == 1


def test_the_longest_message_fits() -> None:
    message = Message(MessageType.OUTPUT, 1, b"\1" * (protocol.FRAME_MAX - 5))
    assert list(Decoder().feed(protocol.encode(message))) == [message]
    with pytest.raises(LocalProtocolError, match="does not fit"):
        protocol.encode(Message(MessageType.OUTPUT, 1, b"\1" * (protocol.FRAME_MAX - 4)))


@pytest.mark.parametrize("arguments", [[], [b"a\0b"], [b"x"] * 256])
def test_commands_that_cannot_be_sent(arguments: list[bytes]) -> None:
    with pytest.raises(LocalProtocolError):
        protocol.execute(1, arguments, 0, 0)


@given(st.binary(max_size=8))
def test_done_is_parsed_or_refused(body: bytes) -> None:
    done = protocol.parse_done(body)
    assert (done is not None) == (len(body) == 6 and body[0] in set(Ending))
