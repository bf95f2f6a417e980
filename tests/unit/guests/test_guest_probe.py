"""The probe itself, run natively with the sanitizers on, over a socket and over a terminal."""

from __future__ import annotations

import contextlib
import errno
import os
import pty
import socket
import subprocess
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvhost.errors import HvHostError
from hvhost.guests import elf, probe
from hvhost.guests import probe_protocol as protocol
from hvhost.guests.probe import ProbeClient, ProbeError, ProbeGone, ProbeTimeout
from hvhost.guests.probe_protocol import Decoder, Ending, Message, MessageType


@pytest.fixture(scope="session")
def checked_probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("probe") / "probe"
    flags = ["-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"]
    flags += ["-fno-sanitize-recover=all"]
    subprocess.run(["gcc", *flags, "-o", str(program), str(probe.SOURCE)], check=True)
    return program


@pytest.fixture
def connection(checked_probe: Path) -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair()
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    process = subprocess.Popen(
        [str(checked_probe), "-"],
        stdin=theirs.fileno(),
        stdout=theirs.fileno(),
        stderr=subprocess.PIPE,
        env=environment,
    )
    theirs.close()
    yield ours
    ours.close()
    _, complaints = process.communicate(timeout=10)
    assert process.returncode == 0, complaints.decode()
    assert b"Sanitizer" not in complaints


@pytest.fixture
def client(connection: socket.socket) -> ProbeClient:
    client = ProbeClient(connection)
    client.wait_ready(10, drivers=False)
    client.ping()  # whatever still came for the start is read now
    return client


def test_output_streams_and_status_are_apart(client: ProbeClient) -> None:
    result = client.run("echo out; echo err >&2; exit 7")
    assert (result.status, result.stdout, result.stderr) == (7, b"out\n", b"err\n")
    assert result.text == "out"


def test_arguments_are_passed_as_they_are(client: ProbeClient) -> None:
    assert client.run(["printf", "%s|", "a b", "$HOME", ""]).stdout == b"a b|$HOME||"


def test_a_signal_is_a_negative_status(client: ProbeClient) -> None:
    assert client.run("kill -SEGV $$").status == -11


def test_a_missing_program_says_so(client: ProbeClient) -> None:
    result = client.run(["/no/such/program"])
    assert result.status == 127
    assert b"No such file" in result.stderr


def test_no_standard_input_is_no_hang(client: ProbeClient) -> None:
    assert client.run("cat").stdout == b""


def test_a_command_that_takes_too_long_is_killed(client: ProbeClient, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(ProbeTimeout, match=r"took longer than 0\.2 s"):
        client.run(f"(sleep 1; touch {mark}) & sleep 60", timeout=0.2)
    time.sleep(1.2)
    assert not mark.exists()
    assert client.run("echo on").stdout == b"on\n"


def test_a_process_left_behind_does_not_hold_up_the_answer(client: ProbeClient) -> None:
    start = time.monotonic()
    assert client.run("sleep 5 & echo done").stdout == b"done\n"
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("size", [0, 1, 3071, 3072, 3073, 200_000])
def test_output_of_any_length_is_complete(client: ProbeClient, size: int) -> None:
    result = client.run(f"head -c {size} /dev/zero")
    assert result.stdout == bytes(size)
    assert not result.truncated


def test_output_is_complete_however_slow_the_line_is(checked_probe: Path) -> None:
    """As a serial line of emulated processors: it takes far longer than the command."""
    (ours, near), (far, theirs) = socket.socketpair(), socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    line = theirs.fileno()
    process = subprocess.Popen([str(checked_probe), "-"], stdin=line, stdout=line)
    theirs.close()

    def pump(source: socket.socket, target: socket.socket, seconds: float) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                time.sleep(seconds)
                target.sendall(data)

    for words in ((near, far, 0.0), (far, near, 0.1)):
        threading.Thread(target=pump, args=words, daemon=True).start()
    try:
        client = ProbeClient(ours)
        client.wait_ready(10, drivers=False)
        result = client.run("head -c 30000 /dev/zero; head -c 9000 /dev/zero >&2")
        assert (len(result.stdout), len(result.stderr)) == (30000, 9000)
        assert not result.truncated
    finally:
        process.kill()
        process.wait()
        for each in (ours, near, far):
            each.close()


def test_output_is_cut_at_its_limit_and_says_so(client: ProbeClient) -> None:
    result = client.run("head -c 300000 /dev/zero; echo ok >&2", output_limit=5000)
    assert result.stdout == bytes(5000)
    assert result.stderr == b"ok\n"
    assert result.truncated
    assert not client.run("head -c 5000 /dev/zero", output_limit=5000).truncated


@pytest.mark.parametrize("size", [0, 1, 3000, 3072, 50_000])
def test_files_arrive_whole_in_both_directions(
    client: ProbeClient, tmp_path: Path, size: int
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 60_000)
    data = os.urandom(size)
    client.write_file(str(file), data, mode=0o600)
    assert file.read_bytes() == data
    assert client.read_file(str(file)) == data


def test_a_new_file_has_the_mode_asked_for(client: ProbeClient, tmp_path: Path) -> None:
    client.write_file(str(tmp_path / "script"), b"#!/bin/sh\n", mode=0o755)
    assert (tmp_path / "script").stat().st_mode & 0o777 == 0o755


def test_write_text_neither_creates_nor_empties(client: ProbeClient, tmp_path: Path) -> None:
    file = tmp_path / "file"
    with pytest.raises(ProbeError, match="ENOENT"):
        client.write_text(str(file), "1")
    file.write_text("abc")
    client.write_text(str(file), "1")
    assert file.read_text() == "1bc"


def test_file_errors_have_the_reason(client: ProbeClient, tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="ENOENT"):
        client.read_file(str(tmp_path / "none"))
    with pytest.raises(ProbeError, match="EISDIR"):
        client.read_file(str(tmp_path))
    with pytest.raises(ProbeError, match="EISDIR"):
        client.write_file(str(tmp_path), b"")


def test_a_file_longer_than_the_limit_is_refused(client: ProbeClient, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 101)
    with pytest.raises(ProbeError, match="longer than 100 bytes"):
        client.read_file(str(tmp_path / "file"), limit=100)
    assert len(client.read_file(str(tmp_path / "file"), limit=101)) == 101


def test_a_script_longer_than_a_frame_runs(client: ProbeClient) -> None:
    assert client.run("# " + "x" * 10_000 + "\necho long").stdout == b"long\n"


def test_a_ping_is_answered_while_a_command_runs(
    client: ProbeClient, connection: socket.socket
) -> None:
    connection.sendall(protocol.execute(1, [b"sleep", b"5"], 0, 100))
    assert client.ping(timeout=2) < 2
    assert client.run("echo next").stdout == b"next\n"  # and this ends the sleep


def test_a_request_ends_the_command_before_it(
    client: ProbeClient, connection: socket.socket
) -> None:
    connection.sendall(protocol.execute(1, [b"sleep", b"60"], 0, 100))
    time.sleep(0.2)
    start = time.monotonic()
    assert client.run("echo next").stdout == b"next\n"
    assert time.monotonic() - start < 5


def test_garbage_and_half_frames_are_passed_over(
    client: ProbeClient, connection: socket.socket
) -> None:
    whole = protocol.execute(9, [b"true"], 0, 100)
    connection.sendall(b"login: \xff\xfe" + whole[: len(whole) // 2] + b"\0" + b"z" * 20_000)
    assert client.run("echo alive").stdout == b"alive\n"


def raw_frame(payload: bytes, checksum: int | None = None) -> bytes:
    crc = zlib.crc32(payload) if checksum is None else checksum
    return b"\0" + protocol.cobs_encode(payload + crc.to_bytes(4, "little")) + b"\0"


@pytest.mark.parametrize(
    "frame",
    [
        raw_frame(b"P\1\0\0\0" + b"x" * 4091),  # the longest there is
        raw_frame(b"P\1\0\0\0" + b"x" * 4092),  # one more
        raw_frame(b"P\1\0\0\0" + bytes(4092)),
        raw_frame(b"P\1\0\0\0" + b"x" * 60_000),
        raw_frame(b"P"),
        raw_frame(b""),
        raw_frame(b"X\1\0\0\0" + bytes(8) + b"\0" * 4000),  # more arguments than there is room for
        b"\0\xff\x01\x02\0",  # a run beyond the frame's end
        b"\0" + b"\xff" * 4200 + b"\0",
    ],
    ids=lambda frame: f"{frame[2:3].hex()}-{len(frame)}",
)
def test_bad_frames_do_no_harm(
    client: ProbeClient, connection: socket.socket, frame: bytes
) -> None:
    connection.sendall(frame)
    assert client.run("echo alive").stdout == b"alive\n"


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        (b"X\1\1\1\1", errno.EINVAL),  # no body
        (b"X\1\1\1\1" + bytes(8), errno.EINVAL),  # no argument
        (b"X\1\1\1\1" + bytes(8) + b"true", errno.EINVAL),  # not ended
        (b"R\1\1\1\1" + bytes(8), errno.EINVAL),
        (b"R\1\1\1\1" + bytes(8) + b"/etc/passwd", errno.EINVAL),
        (b"W\1\1\1\1", errno.EINVAL),
        (b"W\1\1\1\1" + bytes(8), errno.EINVAL),
        (b"W\1\1\1\1" + bytes(8) + b"/dev/null", errno.EINVAL),
        (b"?\1\1\1\1", errno.ENOSYS),
    ],
)
def test_requests_that_make_no_sense_are_refused(
    client: ProbeClient, connection: socket.socket, payload: bytes, error: int
) -> None:
    connection.sendall(raw_frame(payload))
    answer = client._receive(time.monotonic() + 5)
    assert answer is not None
    assert answer.request == 0x01010101
    assert protocol.parse_done(answer.body) == protocol.Done(Ending.FAILED, error, False)


def test_a_frame_is_never_completed_from_an_earlier_one(
    client: ProbeClient, connection: socket.socket
) -> None:
    payload = next(
        payload
        for payload in (b"P" + bytes([i, 1, 1, 1]) for i in range(1, 256))
        if 0 not in zlib.crc32(payload).to_bytes(4, "little")
    )
    ping = raw_frame(payload).strip(b"\0")
    connection.sendall(b"\0" + ping + b"z" * 5000 + b"\0")  # too long, and dropped
    connection.sendall(ping[:1] + b"\0")
    assert client._receive(time.monotonic() + 0.3) is None


def test_a_wrong_checksum_is_not_executed(
    client: ProbeClient, connection: socket.socket, tmp_path: Path
) -> None:
    body = bytes(4) + b"\xff\0\0\0" + f"touch\0{tmp_path}/mark\0".encode()
    connection.sendall(raw_frame(b"X\1\0\0\0" + body, checksum=1))
    time.sleep(0.3)
    assert not (tmp_path / "mark").exists()
    connection.sendall(raw_frame(b"X\1\0\0\0" + body))
    time.sleep(0.3)
    assert (tmp_path / "mark").exists()


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(
        st.binary(max_size=200)
        | st.binary(max_size=300).map(raw_frame)
        # Requests that do no harm to the computer the test runs on: pings and unknown types.
        | st.builds(lambda kind, body: raw_frame(kind + body), st.just(b"P"), st.binary()),
        max_size=8,
    )
)
def test_fuzzed_input_never_stops_the_probe(
    client: ProbeClient, connection: socket.socket, pieces: list[bytes]
) -> None:
    connection.sendall(b"".join(piece for piece in pieces if piece[2:3] not in (b"X", b"W")))
    assert client.ping(timeout=5) < 5


def test_over_a_terminal_every_byte_gets_through(checked_probe: Path, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    process = subprocess.Popen(
        [str(checked_probe), os.ttyname(slave)], start_new_session=True, env=environment
    )
    ours, bridge = socket.socketpair()

    def pump(source: int, target: int) -> None:
        try:
            while data := os.read(source, 4096):
                os.write(target, data)
        except OSError:
            return  # the other side is closed: the test is over

    threads = [
        threading.Thread(target=pump, args=(a, b), daemon=True)
        for a, b in ((master, bridge.fileno()), (bridge.fileno(), master))
    ]
    for thread in threads:
        thread.start()
    try:
        client = ProbeClient(ours)
        client.wait_ready(10, drivers=False)
        data = bytes(range(256)) * 40
        client.write_file(str(tmp_path / "file"), data)
        assert client.read_file(str(tmp_path / "file")) == data
        # It owns the port, or a command that opens it would, and hang a real one up at its end.
        status = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        assert int(status[4]) == os.fstat(slave).st_rdev
    finally:
        process.kill()
        process.wait()
        os.close(slave)
        ours.close()


class FakeGuest:
    """The guest's end of the port, driven by the test."""

    def __init__(self) -> None:
        self.client_end, self.end = socket.socketpair()
        self.client = ProbeClient(self.client_end)
        self._decoder = Decoder()
        self.end.settimeout(5)

    def receive(self) -> Message:
        while True:
            for message in self._decoder.feed(self.end.recv(4096)):
                return message

    def send(self, *messages: Message) -> None:
        for message in messages:
            self.end.sendall(protocol.encode(message))


def test_no_answer_is_a_timeout() -> None:
    guest = FakeGuest()
    with pytest.raises(ProbeTimeout, match=r"did not answer within 0\.3 s"):
        guest.client.wait_ready(0.3)
    with pytest.raises(ProbeTimeout):
        guest.client.ping(0.1)


def test_time_that_is_over_is_a_timeout_too() -> None:
    guest = FakeGuest()
    with pytest.raises(ProbeTimeout, match="did not answer within 0 s"):
        guest.client.ping(0.0)


def test_a_guest_that_only_stops_sending_is_gone() -> None:
    guest = FakeGuest()
    guest.end.shutdown(socket.SHUT_WR)
    with pytest.raises(ProbeGone):
        guest.client.ping(1.0)


def test_a_closed_port_is_gone() -> None:
    guest = FakeGuest()
    guest.end.close()
    with pytest.raises(ProbeGone):
        guest.client.wait_ready(5)
    with pytest.raises(ProbeGone):
        guest.client.run("true")


def test_a_port_nobody_reads_is_a_timeout_not_a_hang() -> None:
    guest = FakeGuest()
    guest.client_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with pytest.raises(ProbeTimeout):
        guest.client.wait_ready(2)


def in_background(action: object) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)  # type: ignore[arg-type]
    thread.start()
    return thread


def test_a_restart_ends_the_running_request_and_is_found_again() -> None:
    guest = FakeGuest()

    def restart() -> None:
        guest.receive()
        guest.end.sendall(b"\xff\x00boot noise")
        guest.send(Message(MessageType.HELLO, 1))

    thread = in_background(restart)
    with pytest.raises(ProbeTimeout, match="started again"):
        guest.client.run("sleep 100", timeout=5)
    thread.join()

    def answer() -> None:
        ping = guest.receive()
        guest.send(Message(MessageType.PONG, 12345), Message(MessageType.PONG, ping.request))

    thread = in_background(answer)
    guest.client.wait_ready(5, drivers=False)
    thread.join()


def test_answers_to_others_are_not_taken_for_ours() -> None:
    guest = FakeGuest()

    def answer() -> None:
        request = guest.receive().request
        done = bytes([0, 0, 0, 0, 0, 0])
        guest.send(
            Message(MessageType.OUTPUT, request ^ 1, b"theirs"),
            Message(MessageType.DONE, request ^ 1, done),
            Message(MessageType.DONE, request, b"short"),
            Message(MessageType.OUTPUT, request, b"ours"),
            Message(MessageType.DONE, request, done),
        )

    thread = in_background(answer)
    assert guest.client.run("x", timeout=5).stdout == b"ours"
    thread.join()


def test_an_answer_to_others_does_not_make_a_probe_ready() -> None:
    """It may have lain in the serial port since another client asked."""
    guest = FakeGuest()

    def answer() -> None:
        request = guest.receive().request
        guest.send(Message(MessageType.PONG, request ^ 1), Message(MessageType.OUTPUT, request))

    thread = in_background(answer)
    with pytest.raises(ProbeTimeout):
        guest.client.wait_ready(0.3, drivers=False)
    thread.join()


def test_a_guest_that_sends_more_than_asked_for_is_stopped() -> None:
    guest = FakeGuest()

    def answer() -> None:
        request = guest.receive().request
        guest.send(*[Message(MessageType.ERRORS, request, b"x" * 1000)] * 3)

    thread = in_background(answer)
    with pytest.raises(ProbeError, match="more than 2000 bytes"):
        guest.client.run("true", timeout=5, output_limit=2000)
    thread.join()


@pytest.mark.parametrize(
    ("ending", "value", "words"),
    [
        (Ending.CANCELLED, 0, "ended by another request"),
        (Ending.FAILED, errno.EAGAIN, r"cannot run .*EAGAIN"),
    ],
)
@pytest.mark.parametrize("way", ["run", "follow"])
def test_commands_that_did_not_run_to_their_end(
    ending: Ending, value: int, words: str, way: str
) -> None:
    guest = FakeGuest()

    def answer() -> None:
        body = bytes([ending, 0, value, 0, 0, 0])
        guest.send(Message(MessageType.DONE, guest.receive().request, body))

    thread = in_background(answer)
    with pytest.raises(ProbeError, match=words):
        if way == "run":
            guest.client.run(["true"], timeout=5)
        else:
            guest.client.follow(["true"], lambda error, data: None)
    thread.join()


def test_a_followed_program_may_be_silent_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "FOLLOW_INTERVAL", 0.01)
    guest = FakeGuest()

    def answer() -> None:
        request = guest.receive().request
        time.sleep(0.1)
        guest.send(
            Message(MessageType.OUTPUT, request ^ 1, b"theirs"),
            Message(MessageType.DONE, request ^ 1, bytes(6)),
            Message(MessageType.ERRORS, request, b"warning"),
            Message(MessageType.DONE, request, b"short"),
            Message(MessageType.OUTPUT, request, b"ours"),
            Message(MessageType.DONE, request, bytes([Ending.SIGNALLED, 0, 9, 0, 0, 0])),
        )

    thread = in_background(answer)
    output: list[tuple[bool, bytes]] = []
    status = guest.client.follow(["sleep", "100"], lambda *piece: output.append(piece))
    assert (status, output) == (-9, [(True, b"warning"), (False, b"ours")])
    thread.join()


def test_a_restart_ends_a_followed_program() -> None:
    guest = FakeGuest()

    def restart() -> None:
        guest.receive()
        guest.send(Message(MessageType.HELLO, 1))

    thread = in_background(restart)
    with pytest.raises(ProbeGone, match="started again while the command ran"):
        guest.client.follow(["sleep", "100"], lambda error, data: None)
    thread.join()


@pytest.mark.parametrize("length", [3072, 3073])
def test_a_path_that_leaves_no_room_for_data_is_refused(length: int) -> None:
    with pytest.raises(ProbeError, match="too long for the probe"):
        FakeGuest().client.write_file("/" * length, b"data")


def test_drivers_that_do_not_finish_loading_are_named() -> None:
    guest = FakeGuest()

    def answer() -> None:
        guest.send(Message(MessageType.PONG, guest.receive().request))
        request = guest.receive()
        guest.send(Message(MessageType.DONE, request.request, bytes([2, 0, 0, 0, 0, 0])))

    thread = in_background(answer)
    with pytest.raises(ProbeTimeout, match="did not finish loading its drivers"):
        guest.client.wait_ready(5)
    thread.join()


def test_the_probe_is_static_and_compiled_once() -> None:
    path = probe.build_probe()
    assert elf.linkage(path.read_bytes()) == elf.Linkage(None, ())
    before = path.stat().st_mtime_ns
    assert probe.build_probe() == path
    assert path.stat().st_mtime_ns == before


def test_no_compiler_is_said_plainly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HvHostError, match="install gcc"):
        probe.build_probe()
    monkeypatch.setenv("CC", "/bin/false")
    with pytest.raises(HvHostError, match="could not build"):
        probe.build_probe()


def test_a_file_is_waited_for(client: ProbeClient, tmp_path: Path) -> None:
    path = tmp_path / "late"
    with pytest.raises(ProbeTimeout, match=r"longer than 0\.2 s"):
        client.wait_file(str(path), 0.2)
    timer = threading.Timer(0.2, path.touch)
    timer.start()
    client.wait_file(str(path), 10)
    timer.join()
    client.wait_file(str(path), 10)  # it is there


@pytest.mark.parametrize(("said", "there"), [("listening\n", True), ("none\n", False)])
def test_the_probe_says_whether_it_has_sockets(
    client: ProbeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, there: bool
) -> None:
    monkeypatch.setattr(probe, "SOCKETS_FILE", str(tmp_path / "sockets"))
    (tmp_path / "sockets").write_text(said)
    assert client.has_sockets(10) is there
