"""VSTOR packets and limits: pure functions."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.errors import RemoteProtocolError
from hvhost.storage.limits import BURST_SECONDS, Limiter
from hvhost.storage.protocol import (
    HEADER_SIZE,
    ChannelProperties,
    Operation,
    ScsiRequest,
    complete,
    complete_request,
    notice,
    parse_command,
    parse_operation,
)
from hvhost.storage.scsi import COMMAND_LENGTHS, Sense, SenseKey, parse_extent

REQUESTS = st.builds(
    ScsiRequest,
    st.integers(0, 0xFFFF),
    *(st.integers(0, 0xFF) for _ in range(6)),
    st.integers(1, 16),
    *(st.integers(0, 0xFF) for _ in range(3)),
    st.integers(0, 0xFFFFFFFF),
    st.binary(min_size=16, max_size=16),
)


@given(REQUESTS, st.sampled_from([48, 64]))
def test_the_fast_look_sees_what_the_record_says(request: ScsiRequest, size: int) -> None:
    payload = (struct.pack("<III", 3, 1, 0) + request.pack()).ljust(size, b"\0")[:size]
    command = parse_command(payload)
    assert command == (
        3,
        request.path_id,
        request.target_id,
        request.lun,
        request.cdb_length,
        request.data_transfer_length,
        request.cdb,
    )


@given(REQUESTS, st.integers(0, 0xFFFFFFFF), st.binary(max_size=40))
def test_answers_repeat_their_request(request: ScsiRequest, moved: int, sense: bytes) -> None:
    payload = (struct.pack("<III", 3, 1, 0) + request.pack()).ljust(64, b"\x5a")
    answer = complete_request(payload, 4, 2, moved, sense)
    told = ScsiRequest.unpack(answer, HEADER_SIZE)
    count = min(len(sense), request.sense_info_length, 20)
    assert answer[:12] == struct.pack("<III", 1, 0, 0) and len(answer) == 64
    assert (told.srb_status, told.scsi_status) == (0x84 if sense else 4, 2)
    assert (told.sense_info_length, told.data_transfer_length) == (count, moved)
    assert answer[28 : 28 + count] == sense[:count] and answer[48:] == payload[48:]
    assert (told.lun, told.target_id, told.path_id) == (
        request.lun,
        request.target_id,
        request.path_id,
    )


@given(st.binary(max_size=80))
def test_any_packet_is_parsed_or_refused(payload: bytes) -> None:
    try:
        command = parse_command(payload)
        parse_operation(command.operation)
    except RemoteProtocolError:
        assert len(payload) < 48 or payload[0] > 13 or any(payload[1:4]) or payload[0] in (0, 3)


def test_other_answers() -> None:
    payload = bytes(64)
    body = ChannelProperties(max_channel_count=3, flags=1, max_transfer_bytes=1 << 21)
    answer = complete(payload, 0, body)
    assert len(answer) == 64 and ChannelProperties.unpack(answer, 12) == body
    assert struct.unpack_from("<III", complete(payload, 0xC000000D)) == (1, 0, 0xC000000D)
    assert notice(Operation.ENUMERATE_BUS, 48) == b"\x0b" + bytes(47)


@given(
    st.sampled_from([0x28, 0xA8, 0x88]),
    st.integers(0, 2**32 - 1),
    st.integers(0, 0xFFFF),
    st.integers(0, 255),
)
def test_extents(code: int, lba: int, blocks: int, flags: int) -> None:
    layout = {0x28: ">BBIxHx", 0xA8: ">BBIIxx", 0x88: ">BBQIxx"}[code]
    cdb = struct.pack(layout, code, flags, lba, blocks)
    assert len(cdb) == COMMAND_LENGTHS[code >> 5]
    assert parse_extent(cdb.ljust(16, b"\xff")) == (lba, blocks, flags)


def test_sense_in_both_formats() -> None:
    sense = Sense(SenseKey.UNIT_ATTENTION, 0x2A, 0x09)
    assert sense.pack() == bytes.fromhex("70000600000000 0a 00000000 2a09 00 000000")
    assert sense.pack_descriptor() == bytes.fromhex("72 06 2a 09 00000000")


@pytest.mark.parametrize(("iops", "bandwidth", "size"), [(100, 0, 1), (0, 1 << 20, 64 << 10)])
def test_a_limit_holds_over_time(iops: int, bandwidth: int, size: int) -> None:
    """However requests come, no more is done in a time than the rate and one burst."""
    limiter = Limiter.of(iops, bandwidth)
    assert limiter is not None
    now, done = 100.0, 0
    while now < 110.0:
        now += limiter.delay(now, size)
        done += 1 if iops else size
    rate = iops or bandwidth
    assert rate * 9.5 <= done <= rate * (10 + BURST_SECONDS) + size


@pytest.mark.parametrize(("size", "requests"), [(4096, 100.0), (64 << 10, 16.0)])
def test_of_two_limits_the_lower_one_holds(size: int, requests: float) -> None:
    """100 requests and 1 MiB a second: that is 16 requests of 64 KiB."""
    limiter = Limiter.of(100, 1 << 20)
    assert limiter is not None
    now, done = 100.0, 0
    while now < 110.0:
        now += limiter.delay(now, size)
        done += 1
    assert requests * 9.5 <= done <= requests * (10 + BURST_SECONDS) + 1


def test_no_limit_is_none() -> None:
    assert Limiter.of(0, 0) is None
    limiter = Limiter.of(10, 0)
    assert limiter is not None and limiter.delay(5.0, 1 << 30) < 1.0
