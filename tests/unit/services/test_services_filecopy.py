"""File copy against both of Linux's daemons, simulated, and against bad ones."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.errors import HvHostError
from hvhost.services.filecopy import ANSWER_SECONDS, DAEMON_SECONDS, Copy, FileCopy
from hvhost.services.filecopy_protocol import (
    DATA_FRAGMENT,
    CopyFlags,
    Target,
    check_uio_target,
    parse_target,
    start_body,
    write_body,
)
from simulated.driver import GuestService, SimulatedGuest

E_FAIL, EXISTS, FULL = 0x80004005, 0x80070050, 0x80070070
START, WRITE, COMPLETE, CANCEL = range(4)


class Daemon:
    """``hv_fcopy_daemon``, or ``hv_fcopy_uio_daemon``, and the files it keeps."""

    def __init__(self, *, uio: bool = False, late: bool = False) -> None:
        self.guest = SimulatedGuest()
        self.device = FileCopy()
        self.host = self.guest.server.add_device(self.device)
        self.guest.connect()
        self.service = GuestService(self.guest.open(1), [(1, 1)])
        self.uio = uio
        self.files: dict[str, bytearray] = {}
        self.target: str | None = None
        self.flags = 0
        self.size = 0
        self.operations: list[int] = []
        self.room = 1 << 60
        self.fail: dict[int, int] = {}  # operation: status
        if not late:
            self.answer()

    def answer(self) -> int:
        """Read what is there, do it, and answer; how many messages there were."""
        packets = self.service.channel.read()
        for packet in packets:
            message = bytearray(packet.payload)
            if struct.unpack_from("<H", message, 12)[0] == 0:
                self.service._choose(message)
            else:
                struct.pack_into("<I", message, 20, self._serve(bytes(message[28:])))
            message[25] = 5
            # The daemon on UIO writes its answer itself, and knows of no transaction.
            number = 0xFFFFFFFFFFFFFFFF if self.uio else packet.transaction_id
            assert self.service.channel.write(bytes(message), transaction_id=number)
        return len(packets)

    def run(self) -> None:
        while self.answer():
            pass

    def _serve(self, body: bytes) -> int:
        operation = struct.unpack_from("<I", body)[0]
        self.operations.append(operation)
        if operation in self.fail:
            return self.fail[operation]
        if operation == START:
            name, path = (
                body[at : at + 520].decode("utf-16-le").partition("\0")[0] for at in (36, 556)
            )
            self.flags, self.size = struct.unpack_from("<IQ", body, 1076)
            target = path + name
            if target in self.files and not self.flags & 1:
                return EXISTS
            self.files[target] = bytearray()
            self.target = target
            return 0
        if operation == CANCEL:
            if self.uio:
                return E_FAIL
            if self.target is not None:
                del self.files[self.target]
        if operation == WRITE:
            assert self.target is not None and len(body) == 52 + DATA_FRAGMENT
            offset, size = struct.unpack_from("<QI", body, 40)
            file = self.files[self.target]
            if offset >= self.room:
                return FULL
            file[len(file) : offset] = bytes(max(0, offset - len(file)))
            file[offset : offset + size] = body[52 : 52 + min(size, self.room - offset)]
            # A write that was cut short sets no errno.
            return E_FAIL if offset + size > self.room else 0
        self.target = None
        return 0

    def copy(
        self,
        content: bytes,
        target: str = "/var/file",
        flags: CopyFlags | int = 0,
        read: Callable[[int, int], bytes] | None = None,
    ) -> list[HvHostError | None]:
        ends: list[HvHostError | None] = []

        def piece(offset: int, size: int) -> bytes:
            assert 0 <= offset < offset + size <= len(content) and size <= DATA_FRAGMENT
            return content[offset : offset + size]

        self.device.start(
            Copy(
                parse_target(target, "file"),
                CopyFlags(flags),
                len(content),
                read or piece,
                ends.append,
            )
        )
        return ends


def sentence(ends: list[HvHostError | None]) -> str:
    (end,) = ends
    assert isinstance(end, HvHostError)
    assert str(end).endswith(".")
    return str(end)


@pytest.fixture(params=[False, True], ids=["kernel", "uio"])
def daemon(request: pytest.FixtureRequest) -> Daemon:
    return Daemon(uio=request.param)


# Copying.


@pytest.mark.parametrize("size", [0, 1, 6143, 6144, 6145, 50_000])
def test_a_file_arrives_whole(daemon: Daemon, size: int) -> None:
    assert daemon.device.ready and daemon.device.state.user_space is daemon.uio
    content = bytes(number % 251 for number in range(size))
    flags = CopyFlags.CREATE_PATH | CopyFlags.OVER_WRITE
    ends = daemon.copy(content, "/a/b/", flags)
    assert daemon.device.copy is not None
    daemon.run()
    assert ends == [None] and daemon.device.copy is None
    assert daemon.files == {"/a/b/file": content}
    assert (daemon.flags, daemon.size) == (3, size)
    writes = (size + DATA_FRAGMENT - 1) // DATA_FRAGMENT
    assert daemon.operations == [START, *[WRITE] * writes, COMPLETE]


def test_messages_go_one_by_one(daemon: Daemon) -> None:
    daemon.copy(bytes(20_000))
    while daemon.device.copy is not None:
        assert daemon.answer() == 1


def test_one_file_at_a_time(daemon: Daemon) -> None:
    daemon.copy(bytes(20_000))
    with pytest.raises(HvHostError, match="/var/file is being copied"):
        daemon.copy(b"")
    daemon.run()
    assert daemon.copy(b"", "/other") == []


# A guest that has just booted.


def test_no_driver() -> None:
    device, ends = FileCopy(), list[HvHostError | None]()
    device.start(Copy(Target("/", "x"), CopyFlags(0), 0, lambda *_: b"", ends.append))
    for now in (1000.0, 1000.0 + DAEMON_SECONDS - 0.1):
        device.tick(now)
        assert ends == []
    device.tick(1000.0 + DAEMON_SECONDS)
    assert "has taken no files for 10 s" in sentence(ends) and device.copy is None


@pytest.mark.parametrize("uio", [False, True])
def test_a_driver_that_comes_late(uio: bool) -> None:
    daemon = Daemon(uio=uio, late=True)
    ends = daemon.copy(b"content")
    daemon.device.tick(1000.0)
    assert not daemon.device.ready and daemon.device.copy is not None
    daemon.run()
    daemon.device.tick(1001.0)
    daemon.run()
    assert ends == [None] and daemon.files == {"/var/file": b"content"}


def test_a_driver_that_comes_late_and_cannot_have_the_file() -> None:
    daemon = Daemon(uio=True, late=True)
    ends = daemon.copy(b"", "/ä")
    daemon.run()
    daemon.device.tick(1000.0)
    assert "ASCII" in sentence(ends) and daemon.operations == []


def test_a_daemon_that_comes_later_than_its_driver() -> None:
    """Linux's driver answers for it that it failed."""
    daemon = Daemon()
    daemon.fail[START] = E_FAIL
    ends = daemon.copy(b"content")
    daemon.run()
    daemon.device.tick(1000.0)
    daemon.run()
    assert ends == [] and daemon.operations == [START, START]
    daemon.fail.clear()
    daemon.device.tick(1002.0)
    daemon.run()
    assert ends == [None] and daemon.files == {"/var/file": b"content"}


def test_a_daemon_that_does_not_come() -> None:
    daemon = Daemon()
    daemon.fail[START] = E_FAIL
    ends = daemon.copy(b"content")
    for now in (1000.0, 1000.0 + DAEMON_SECONDS - 0.1):
        daemon.run()
        daemon.device.tick(now)
        assert ends == []
    daemon.run()
    daemon.device.tick(1000.0 + DAEMON_SECONDS)
    assert "file copy daemon does not run" in sentence(ends)


def test_a_copy_that_waits_for_a_daemon_is_cancelled() -> None:
    daemon = Daemon(late=True)
    ends = daemon.copy(b"content")
    daemon.device.cancel()
    daemon.run()
    daemon.device.tick(1000.0)
    assert "cancelled after 0 of 7 bytes" in sentence(ends) and daemon.operations == []


def test_a_daemon_is_waited_for_again_after_the_channel_was_closed() -> None:
    daemon = Daemon()
    daemon.copy(b"")
    daemon.run()
    daemon.guest.close(1)
    daemon.service = GuestService(daemon.guest.open(1), [(1, 1)])
    daemon.fail[START] = E_FAIL
    daemon.run()
    ends = daemon.copy(b"")
    daemon.run()
    assert ends == []


# Failing.


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (EXISTS, "exists in the guest already; use --overwrite"),
        (FULL, "no room"),
        (E_FAIL, "--create-path"),
        (0x80070005, "0x80070005"),
    ],
)
def test_a_start_that_is_refused(daemon: Daemon, status: int, words: str) -> None:
    daemon.copy(b"", "/first")
    daemon.run()  # it is there, and says what it means
    daemon.operations.clear()
    daemon.fail[START] = status
    ends = daemon.copy(bytes(100))
    daemon.run()
    assert words in sentence(ends)
    assert daemon.operations == [START]
    daemon.fail.clear()
    ends = daemon.copy(b"x")
    daemon.run()
    assert ends == [None]


def test_an_existing_file_is_left_alone(daemon: Daemon) -> None:
    daemon.files["/var/file"] = bytearray(b"mine")
    ends = daemon.copy(b"yours")
    daemon.run()
    assert "exists" in sentence(ends) and daemon.files == {"/var/file": b"mine"}
    ends = daemon.copy(b"yours", flags=CopyFlags.OVER_WRITE)
    daemon.run()
    assert ends == [None] and daemon.files == {"/var/file": b"yours"}


@pytest.mark.parametrize("room", [DATA_FRAGMENT * 2, DATA_FRAGMENT * 2 + 100])
def test_a_disk_that_becomes_full(daemon: Daemon, room: int) -> None:
    daemon.room = room
    ends = daemon.copy(bytes(50_000))
    daemon.run()
    assert "became full" in sentence(ends)
    check_taken_back(daemon, sentence(ends))


def check_taken_back(daemon: Daemon, words: str) -> None:
    if daemon.uio:
        assert "An empty /var/file is left" in words
        assert daemon.files == {"/var/file": b""}
    else:
        assert "Nothing of it is left" in words
        assert not daemon.files


def test_an_error_on_the_guests_disk(daemon: Daemon) -> None:
    ends = daemon.copy(bytes(50_000))
    daemon.answer()
    daemon.fail[WRITE] = E_FAIL
    daemon.run()
    assert "0x80004005" in sentence(ends)
    check_taken_back(daemon, sentence(ends))


def test_an_end_that_fails(daemon: Daemon) -> None:
    daemon.fail[COMPLETE] = 0x80070001
    ends = daemon.copy(b"x")
    daemon.run()
    assert "0x80070001" in sentence(ends)
    assert daemon.files in ({}, {"/var/file": b""})


def test_cancelled(daemon: Daemon) -> None:
    ends = daemon.copy(bytes(50_000))
    for _ in range(3):
        daemon.answer()
    daemon.device.cancel()
    daemon.device.cancel()
    assert ends == []
    daemon.run()
    assert sentence(ends).startswith("The copy was cancelled after 12288 of 50000 bytes.")
    check_taken_back(daemon, sentence(ends))
    daemon.device.cancel()  # nothing to be cancelled


def test_cancelled_at_its_very_end(daemon: Daemon) -> None:
    ends = daemon.copy(b"x")
    daemon.answer()
    daemon.answer()
    daemon.device.cancel()  # COMPLETE is under way: too late
    daemon.run()
    assert ends == [None] and daemon.files == {"/var/file": b"x"}


def test_cancelled_while_it_fails(daemon: Daemon) -> None:
    """The first that happened is said, and the file is not read any further."""
    reads: list[int] = []

    def read(offset: int, size: int) -> bytes:
        reads.append(offset)
        return bytes(size)

    ends = daemon.copy(bytes(50_000), read=read)
    daemon.answer()
    daemon.device.cancel()
    daemon.fail[WRITE] = E_FAIL
    daemon.run()
    assert sentence(ends).startswith("The copy was cancelled after 0 of 50000 bytes.")
    assert reads == [0] and daemon.operations.count(WRITE) == 1
    daemon.fail[WRITE] = FULL
    ends = daemon.copy(bytes(50_000), flags=CopyFlags.OVER_WRITE)
    daemon.answer()
    daemon.answer()
    daemon.device.cancel()  # it is being taken back already
    daemon.run()
    assert "became full" in sentence(ends)


def test_a_file_that_becomes_shorter(daemon: Daemon) -> None:
    ends = daemon.copy(bytes(50_000), read=lambda offset, size: bytes(min(size, 9000 - offset)))
    daemon.run()
    assert "became shorter" in sentence(ends)
    check_taken_back(daemon, sentence(ends))


def test_a_file_that_cannot_be_read(daemon: Daemon) -> None:
    def read(offset: int, size: int) -> bytes:
        if offset:
            raise OSError(5, "Input/output error")
        return bytes(size)

    ends = daemon.copy(bytes(50_000), read=read)
    daemon.run()
    assert "cannot be read any further: Input/output error." in sentence(ends)
    check_taken_back(daemon, sentence(ends))


def test_a_daemon_that_is_killed(daemon: Daemon) -> None:
    """Linux's driver fails everything from then on."""
    ends = daemon.copy(bytes(50_000))
    daemon.answer()
    daemon.answer()
    daemon.fail = dict.fromkeys(range(4), E_FAIL)
    daemon.run()
    assert "daemon ended" in sentence(ends)
    assert "What there is of /var/file in the guest is incomplete" in sentence(ends)
    daemon.fail.clear()
    ends = daemon.copy(b"again", flags=CopyFlags.OVER_WRITE)
    daemon.run()
    assert ends == [None]


def test_a_channel_that_closes(daemon: Daemon) -> None:
    ends = daemon.copy(bytes(50_000))
    daemon.answer()
    daemon.answer()
    daemon.guest.close(1)
    assert "went away after 6144 of 50000 bytes" in sentence(ends)
    assert "incomplete" in sentence(ends)
    assert not daemon.device.ready


def test_a_guest_that_does_not_answer(daemon: Daemon) -> None:
    daemon.device.tick(0.0)
    ends = daemon.copy(bytes(50_000))
    daemon.device.tick(1000.0)  # time before this tick is nobody's
    daemon.device.tick(1000.0 + ANSWER_SECONDS - 0.1)
    assert ends == []
    daemon.device.tick(1000.0 + ANSWER_SECONDS)
    assert "not answered for 40 s" in sentence(ends)
    with pytest.raises(HvHostError, match="has not answered the last"):
        daemon.copy(b"")
    daemon.run()  # an answer nobody waits for
    ends = daemon.copy(b"", flags=CopyFlags.OVER_WRITE)
    daemon.run()
    assert ends == [None]


def test_a_slow_guest_is_not_given_up(daemon: Daemon) -> None:
    ends = daemon.copy(bytes(DATA_FRAGMENT))
    for number in range(3):
        daemon.device.tick(number * 39.0)
        daemon.answer()
    daemon.device.tick(500.0)
    assert ends == [None]


class Moody(Daemon):
    """Refuses some of what it is asked, and does not do it then."""

    def __init__(self, moods: list[int | None], *, uio: bool) -> None:
        self.moods = iter(moods)
        super().__init__(uio=uio)

    def _serve(self, body: bytes) -> int:
        mood = next(self.moods, None)
        return super()._serve(body) if mood is None else mood


@given(
    st.integers(0, 4 * DATA_FRAGMENT),
    st.lists(st.sampled_from([None, None, None, E_FAIL, EXISTS, FULL, 5]), max_size=9),
    st.booleans(),
    st.integers(0, 9),
    st.sampled_from([0, 2 * DATA_FRAGMENT + 50, 1 << 60]),
)
def test_whatever_goes_wrong_the_sentence_is_true(
    size: int, moods: list[int | None], uio: bool, cancelled: int, room: int
) -> None:
    content = bytes(number * 7 % 251 for number in range(size))
    daemon = Moody(moods, uio=uio)
    daemon.room = room
    ends = daemon.copy(content)
    for messages in range(30):
        if messages == cancelled:
            daemon.device.cancel()
        daemon.device.tick(2.0 * messages)
        if not daemon.answer() and daemon.device.copy is None:
            break
    assert daemon.device.copy is None and not daemon.guest.faults
    kept = daemon.files.get("/var/file")
    left = None if kept is None else bytes(kept)
    if ends == [None]:
        assert left == content and daemon.target is None  # and closed
        return
    said = sentence(ends)
    if "Nothing of it is left" in said:
        assert left is None
    elif "An empty /var/file is left" in said:
        assert left == b""
    else:
        assert "incomplete" in said or left is None


def test_answers_to_nothing(daemon: Daemon) -> None:
    message = bytearray(28)
    struct.pack_into("<IIHHHHHHIBB", message, 0, 1, 20, 3, 0, 7, 1, 1, 0, 0, 77, 5)
    daemon.service.channel.write(bytes(message))
    assert len(daemon.guest.faults) == 1 and "answers no request" in daemon.guest.faults[0]


def test_a_guest_that_breaks_its_ring_while_a_file_is_copied(daemon: Daemon) -> None:
    ends = daemon.copy(bytes(50_000))
    daemon.service.channel.incoming.set_word(1, 12345)
    daemon.service.channel.signal()
    daemon.device.tick(1.0)
    daemon.service.channel.out.set_word(0, 12345)
    daemon.service.channel.signal()
    assert "went away" in sentence(ends)


# Names.


@pytest.mark.parametrize(
    ("destination", "path", "name"),
    [
        ("/file", "/", "file"),
        ("/", "/", "source"),
        ("/a/b", "/a/", "b"),
        ("/a/b/", "/a/b/", "source"),
        ("/a//b", "/a/", "b"),
        ("/ä/ö", "/ä/", "ö"),
        ("/" + "a" * 257 + "/" + "b" * 259, "/" + "a" * 257 + "/", "b" * 259),
    ],
)
def test_where_a_file_goes(destination: str, path: str, name: str) -> None:
    target = parse_target(destination, "source")
    assert target == Target(path, name) and str(target) == path + name


@pytest.mark.parametrize(
    ("destination", "words"),
    [
        ("file", "not an absolute path"),
        ("", "not an absolute path"),
        ("/a/..", "names no file"),
        ("/a/.", "names no file"),
        ("/a\0b", "names no file"),
        ("/" + "a" * 258 + "/b", "too long"),
        ("/" + "b" * 260, "too long"),
        ("/" + "ä" * 130, "too long"),
        ("/\udc80", "not valid Unicode"),
    ],
)
def test_where_no_file_goes(destination: str, words: str) -> None:
    with pytest.raises(HvHostError, match=words):
        parse_target(destination, "source")


@given(st.text(max_size=300), st.text(max_size=10))
def test_any_name_fits_its_message_or_is_refused(destination: str, source: str) -> None:
    try:
        target = parse_target(destination, source)
    except HvHostError:
        return
    body = start_body(target, CopyFlags(0), 1)
    assert len(body) == 1088
    for at, text in ((36, target.name), (556, target.path)):
        assert body[at : at + 520].decode("utf-16-le").partition("\0")[0] == text
        assert len(text.encode()) < 260


def test_what_the_daemon_on_uio_cannot_take() -> None:
    daemon = Daemon(uio=True)
    for target, words in (("/ä", "ASCII"), ("/" + "b" * 130, "too long")):
        with pytest.raises(HvHostError, match=words):
            daemon.copy(b"", target)
    check_uio_target(Target("/" + "a" * 127 + "/", "b" * 129))
    with pytest.raises(HvHostError, match="too long"):
        check_uio_target(Target("/" + "a" * 128 + "/", "b"))
    assert Daemon().copy(b"", "/ä") == []


def test_linuxs_ring_holds_one_fragment_and_no_second() -> None:
    """What docs/sockets.md says of throughput: HV_UTIL_RING_RECV_SIZE is 3 pages of data."""
    descriptor, header, trailer = 16, 28, 8
    packet = descriptor + header + len(write_body(0, b"x")) + trailer
    assert packet < 3 * 4096 < 2 * packet


@given(st.integers(0, 2**64 - 1), st.binary(min_size=1, max_size=DATA_FRAGMENT))
def test_every_fragment_is_sent_whole(offset: int, data: bytes) -> None:
    # struct hv_do_fcopy: guests take all of it, whatever size says
    body = write_body(offset, data)
    assert len(body) == 52 + DATA_FRAGMENT
    assert struct.unpack_from("<I32xIQI", body) == (WRITE, 0, offset, len(data))
    assert body[52 : 52 + len(data)] == data and not any(body[52 + len(data) :])
