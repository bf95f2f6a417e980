"""What the fuzzer of the probe's answers runs: a guest may send the host anything for an answer."""

from __future__ import annotations

import zlib

from hvhost.guests.probe_protocol import (
    FRAME_MAX,
    Decoder,
    Message,
    MessageType,
    cobs_decode,
    cobs_encode,
    encode,
    parse_done,
)
from hvhost.wire import Buffer
from simulated.targets import pieces_of

#: A frame's payload, its checksum, and what coding adds.
MOST_KEPT = FRAME_MAX + 4 + FRAME_MAX // 254 + 2


def fuzz_probe(data: Buffer) -> None:
    """Pieces of *data* as they come from a guest: raw, many times over, or as whole frames.

    What is taken for a message is one that could have been sent; little is kept meanwhile; and
    whatever came before, the next message is heard.
    """
    decoder = Decoder()
    for piece in pieces_of(bytes(data)):
        cobs_decode(piece)
        sent = piece[1:]
        if piece and piece[0] & 1:
            checked = sent + zlib.crc32(sent).to_bytes(4, "little")
            sent = b"\0" + cobs_encode(checked) + b"\0"
        elif piece and piece[0] & 2:
            sent *= 40
        for message in decoder.feed(sent):
            assert [*Decoder().feed(encode(message))] == [message]
            if message.type is MessageType.DONE:
                parse_done(message.body)
        assert len(decoder._coded) <= MOST_KEPT
    last = Message(MessageType.PONG, 7)
    assert [*decoder.feed(encode(last))][-1] == last
