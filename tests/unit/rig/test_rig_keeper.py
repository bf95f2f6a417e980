"""The keeper and its clients, with the real agent on a stand-in for QEMU."""

from __future__ import annotations

import fcntl
import itertools
import json
import mmap
import os
import select
import selectors
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig_process import Rig, alive, eventually, stop

from hvhost.errors import HvHostError
from hvhost.kvm.remote import RemoteTransport
from hvhost.rig import client, layout, server
from hvhost.rig.client import RigSession, close_session, open_session, reason_of_end
from hvhost.rig.server import Keeper, Session

pytest_plugins = ["rig_fixtures"]

MIB = 1 << 20


@pytest.fixture
def session(rig: Rig) -> Iterator[RigSession]:
    one = open_session(16 * MIB, 4)
    yield one
    close_session(one)


def readable(descriptor: int, seconds: float = 5.0) -> bool:
    return bool(select.select([descriptor], [], [], seconds)[0])


def test_a_session_comes_and_goes(rig: Rig) -> None:
    session = open_session(16 * MIB, 4)
    assert session.memory_offset == layout.CONTROL_AREA
    assert session.control_offset == layout.control_offset(0)
    assert [number for number, _ in session.vectors] == [33, 34, 35, 36]
    assert len(session.events) == layout.PEER_VECTORS
    close_session(session)
    assert rig.ended() == 0
    assert not (rig.directory / "rig.sock").exists()
    assert not rig.qemus()


def test_who_waits_for_the_rig_is_told_so(rig: Rig) -> None:
    rig.settings["command"] = ["/bin/sh", "-c", f'sleep 0.5; exec {rig.stand_in} "$0"']
    told: list[str] = []
    close_session(open_session(MIB, 1, told.append))
    assert told == ["starting the rig"]


def test_the_socket_is_its_owners(rig: Rig, session: RigSession) -> None:
    assert (rig.directory / "rig.sock").stat().st_mode & 0o777 == 0o600
    assert not (rig.directory / "shared.sock").exists(), "nobody but QEMU may connect there"


def test_two_sessions_have_nothing_in_common(rig: Rig, session: RigSession) -> None:
    other = open_session(16 * MIB, 4)
    assert len(rig.keepers) == 1
    assert other.memory_offset >= session.memory_offset + 16 * MIB
    assert other.control_offset != session.control_offset
    assert not {number for number, _ in other.vectors} & {number for number, _ in session.vectors}
    close_session(other)
    third = open_session(16 * MIB, 4)
    assert third.memory_offset != session.memory_offset
    close_session(third)


def test_places_are_used_again(rig: Rig, session: RigSession) -> None:
    offsets = set()
    for _ in range(40):  # more than there are sessions
        other = open_session(MIB, 4)
        with mmap.mmap(other.memory_descriptor, MIB, offset=other.memory_offset) as view:
            assert not any(view[:4096])
            view[:4] = b"mine"
        offsets.add(other.memory_offset)
        close_session(other)
        # The agent tears down in its own time; vectors come back then, in the order they left.
        time.sleep(0.02)
    assert len(offsets) <= 3


def test_peer_numbers_are_not_used_again(rig: Rig, session: RigSession) -> None:
    """QEMU keeps a freed table of a peer that left, and would write into it."""
    peers = set()
    for number in range(3):
        other = open_session(MIB, 0)
        with mmap.mmap(other.memory_descriptor, 4096) as header:
            entry = layout.HEADER_SESSIONS + layout.SESSION_ENTRY_SIZE
            peers.add(struct.unpack_from("<I", header, entry + layout.SESSION_PEER)[0])
        close_session(other)
        eventually(lambda: "peer" not in rig.log())
        time.sleep(0.1)
        assert len(peers) == number + 1


def test_more_than_there_is(rig: Rig, session: RigSession) -> None:
    with pytest.raises(HvHostError, match=r"no room for another 65 GiB"):
        open_session(65 << 30, 4)
    with pytest.raises(HvHostError, match="serves no more machines"):
        open_session(MIB, layout.VECTORS)
    close_session(open_session(MIB, 4))


def test_all_places_taken(rig: Rig) -> None:
    sessions = [open_session(MIB, 0) for _ in range(layout.MAXIMUM_SESSIONS)]
    with pytest.raises(HvHostError, match="serves no more machines; stop one first"):
        open_session(MIB, 0)
    close_session(sessions.pop())
    again = None
    for _ in range(100):
        try:
            again = open_session(MIB, 0)
            break
        except HvHostError:
            time.sleep(0.02)
    assert again is not None
    for session in (*sessions, again):
        close_session(session)


@pytest.mark.parametrize(
    "request_line",
    [b"nonsense", b"[]", b"{}", b'{"memory": "x", "vectors": 1}', b'{"memory": 0, "vectors": 1}'],
)
def test_a_client_that_talks_nonsense(rig: Rig, session: RigSession, request_line: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(str(rig.directory / "rig.sock"))
        connection.sendall(request_line + b"\n")
        answer = json.loads(connection.recv(4096))
        assert list(answer) == ["error"]
    close_session(open_session(MIB, 1))


def test_a_client_that_says_nothing_keeps_nobody(rig: Rig) -> None:
    session = open_session(MIB, 1)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(rig.directory / "rig.sock"))
        close_session(session)
        assert rig.ended() == 0


def test_the_rig_lingers(rig: Rig) -> None:
    rig.linger = 1.0
    close_session(open_session(MIB, 1))
    time.sleep(0.5)
    close_session(open_session(MIB, 1))
    assert len(rig.keepers) == 1
    time.sleep(0.6)
    assert rig.keeper.poll() is None, "counted from the last session"
    assert rig.ended(3) == 0


def test_a_client_that_is_killed_gives_everything_back(rig: Rig, session: RigSession) -> None:
    child = os.fork()
    if child == 0:
        try:
            other = open_session(512 * MIB, 8)
            with mmap.mmap(other.memory_descriptor, 4 * MIB, offset=other.memory_offset) as view:
                view[:] = b"\xff" * (4 * MIB)
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL

    def small() -> bool:
        return os.fstat(session.memory_descriptor).st_blocks * 512 < 3 * MIB

    eventually(small)


def test_clients_killed_while_the_rig_starts(rig: Rig) -> None:
    rig.settings["command"] = ["/bin/sh", "-c", f'sleep 0.5; exec {rig.stand_in} "$0"']
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            try:
                open_session(MIB, 1)
            finally:
                os._exit(1)
        children.append(child)
        time.sleep(0.1)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    # The keepers the children started are nobody's children now; whoever comes gets a session.
    close_session(open_session(MIB, 1))
    eventually(lambda: not (rig.directory / "rig.sock").exists())


def test_a_keeper_whose_only_client_left_does_not_wait_for_its_qemu(rig: Rig) -> None:
    rig.settings["command"] = ["/bin/sh", "-c", f'exec {rig.stand_in} "$0" no-agent']
    keeper = rig.start_keeper()
    path = rig.directory / "rig.sock"
    eventually(path.exists)
    with socket.socket(socket.AF_UNIX) as connection:
        eventually(lambda: connection.connect_ex(str(path)) == 0)
        connection.sendall(b'{"memory": 1048576, "vectors": 1}\n')
        assert b"starting" in connection.recv(4096)
    assert keeper.wait(10) == 0


def test_a_keeper_waits_for_whom_it_was_started(rig: Rig) -> None:
    """Longer than it lingers, as a computer may be busy; who only looks is not the one."""
    rig.settings["command"] = ["/bin/sh", "-c", "exec sleep 60"]
    rig.start_keeper()
    eventually(lambda: (rig.directory / "rig.sock").exists(), 60)
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(rig.directory / "rig.sock"))
            connection.sendall(b"status\n")
            assert json.loads(connection.recv(4096))["state"] == "starting"
        time.sleep(3 * rig.linger)


# --- QEMU fails ---------------------------------------------------------------------------------


def test_a_qemu_that_ends_at_once_is_tried_again(rig: Rig) -> None:
    marker = rig.directory / "tried"
    second = f'[ -e {marker} ] && exec {rig.stand_in} "$0"'
    script = f"{second}; : > {marker}; sleep 0.3; echo no firmware; exit 1"
    rig.settings["command"] = ["/bin/sh", "-c", script]
    told: list[str] = []
    session = open_session(MIB, 1, told.append)
    assert "the rig did not come up, trying again" in told
    assert "rig attempt 1 failed: no firmware" in rig.log()
    close_session(session)
    assert rig.ended() == 0


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo no firmware; exit 1", "no firmware"),
        ("exit 1", "it printed nothing"),
        ("echo waiting; exec sleep 60", "waiting"),
        ("exec STAND_IN $0 no-agent", "stand-in: connected"),
    ],
)
def test_a_qemu_that_never_comes_up(rig: Rig, script: str, words: str) -> None:
    rig.settings["command"] = ["/bin/sh", "-c", script.replace("STAND_IN", str(rig.stand_in))]
    rig.settings |= {"CONNECT_SECONDS": 0.3, "START_SECONDS": 0.6}
    with pytest.raises(HvHostError, match="did not start in 3 attempts") as caught:
        open_session(MIB, 1)
    assert words in str(caught.value)
    assert "rig.log" in str(caught.value)
    assert rig.ended() == 1
    assert "Traceback" not in rig.log()
    assert not rig.qemus()


def test_a_qemu_that_dies_is_told_to_everybody(rig: Rig) -> None:
    sessions = [open_session(MIB, 1) for _ in range(2)]
    (qemu_process,) = rig.qemus()
    os.kill(qemu_process, signal.SIGKILL)
    for session in sessions:
        assert readable(session.connection.fileno())
        reason = "the rig's QEMU died, by signal 9: hvhost-agent: ready"
        assert reason_of_end(session) == reason
        assert reason_of_end(session) == reason, "said once"
        close_session(session)
    assert rig.ended() == 1
    assert "Traceback" not in rig.log()
    close_session(open_session(MIB, 1))
    assert len(rig.keepers) == 2, "the next one gets a new rig"


def test_the_reason_is_the_same_for_every_thread(rig: Rig) -> None:
    session = open_session(MIB, 1)
    os.kill(rig.qemus()[0], signal.SIGKILL)
    reasons: list[str] = []

    def ask() -> None:
        readable(session.connection.fileno())
        reasons.append(reason_of_end(session))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(reasons) == {"the rig's QEMU died, by signal 9: hvhost-agent: ready"}
    assert len(reasons) == 8
    close_session(session)


def test_a_qemu_that_hangs_is_noticed(rig: Rig) -> None:
    session = open_session(MIB, 1)
    (qemu_process,) = rig.qemus()
    stop(qemu_process)
    started = time.monotonic()
    assert readable(session.connection.fileno(), 10)
    assert 1.5 < time.monotonic() - started < 6
    assert reason_of_end(session).startswith("the rig's QEMU hangs: it has not answered for")
    close_session(session)
    assert rig.ended() == 1
    assert not alive(qemu_process)


def test_a_rig_at_rest_is_not_taken_for_hanging(rig: Rig, session: RigSession) -> None:
    assert not readable(session.connection.fileno(), 3.0)


def test_sessions_while_qemu_hangs_end_with_it(rig: Rig) -> None:
    session = open_session(MIB, 1)
    stop(rig.qemus()[0])
    with pytest.raises(HvHostError, match="QEMU hangs"):
        open_session(MIB, 1)
    close_session(session)
    assert rig.ended() == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_keeper_that_is_killed_takes_qemu_with_it(rig: Rig, number: signal.Signals) -> None:
    session = open_session(MIB, 1)
    (qemu_process,) = rig.qemus()
    rig.keeper.send_signal(number)
    eventually(lambda: not alive(qemu_process))
    assert readable(session.connection.fileno())
    assert reason_of_end(session) == (
        "the rig is gone: its keeper or its QEMU was killed; start the machine again."
    )
    close_session(session)
    close_session(open_session(MIB, 1))


def test_a_keeper_that_does_not_start(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.Popen(["/bin/false"], stdin=subprocess.DEVNULL)
    failed.wait()
    monkeypatch.setattr(client, "_start_keeper", lambda: failed)
    waits: list[float] = []
    monkeypatch.setattr(client, "KEEPER_SECONDS", 1.0)
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(HvHostError, match=r"keeper did not start; see .*rig\.out"):
        open_session(MIB, 1)
    assert not waits, "there is nobody to wait for"


def test_a_keeper_that_is_not_alone_leaves(rig: Rig, session: RigSession) -> None:
    """It would take the other's socket away, now or at its end."""
    first = rig.keeper
    second = rig.start_keeper()
    assert second.wait(10) == 0
    close_session(open_session(MIB, 1))
    assert first.poll() is None
    assert len(rig.keepers) == 2


def test_a_keeper_that_is_just_leaving_is_waited_for(rig: Rig) -> None:
    close_session(open_session(MIB, 1))
    assert rig.ended() == 0
    with (rig.directory / "keeper.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        timer = threading.Timer(1.0, lambda: fcntl.flock(lock, fcntl.LOCK_UN))
        timer.start()
        close_session(open_session(MIB, 1))
        timer.join()
    assert rig.ended() == 0


def test_a_keeper_that_never_leaves(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "KEEPER_SECONDS", 1.0)
    with (rig.directory / "keeper.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(HvHostError, match="keeper did not start"):
            open_session(MIB, 1)


def test_a_keeper_that_never_answers(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.3)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(rig.directory / "rig.sock"))
        listener.listen(4)
        with pytest.raises(HvHostError, match=r"did not answer within 0 s; its log is .*rig\.log"):
            open_session(MIB, 1)


def test_keepers_that_always_leave(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.3)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(rig.directory / "rig.sock"))
    listener.listen(4)

    def hang_up() -> None:
        while True:
            try:
                listener.accept()[0].close()
            except OSError:
                return

    thread = threading.Thread(target=hang_up)
    thread.start()
    with pytest.raises(HvHostError, match="did not answer; run `hvhost doctor`"):
        open_session(MIB, 1)
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


def test_lost_descriptors_are_a_sentence(rig: Rig) -> None:
    ours, theirs = socket.socketpair()
    answer = {"session": 0, "control_offset": 4096, "memory_offset": 0, "vectors": [33, 34]}
    spare = os.open("/dev/null", os.O_RDONLY)
    before = len(list(Path("/proc/self/fd").iterdir()))
    socket.send_fds(theirs, [json.dumps(answer).encode() + b"\n"], [spare] * 3)
    with pytest.raises(HvHostError, match=r"sent 3 descriptors instead of 70; .*ulimit -n"):
        client._negotiate(ours, MIB, 2, lambda text: None)
    assert len(list(Path("/proc/self/fd").iterdir())) == before, "those that came are closed"
    for each in (ours, theirs):
        each.close()
    os.close(spare)


def test_a_keeper_that_leaves_without_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    receive, looks = socket.recv_fds, itertools.count(1)

    def watched(*words: int) -> object:
        assert next(looks) < 10, "it is listened to for ever"
        return receive(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "recv_fds", watched)
    ours, theirs = socket.socketpair()
    theirs.sendall(b'{"progress": "starting')
    theirs.shutdown(socket.SHUT_WR)
    assert client._negotiate(ours, MIB, 2, lambda text: None) is None
    for each in (ours, theirs):
        each.close()


def test_last_words_that_are_no_words() -> None:
    for words in (b"", b"nonsense", b"{}\n", b"\n", b"[1]", b"\xff", b'"error"'):
        ours, theirs = socket.socketpair()
        theirs.sendall(words)
        theirs.close()
        session = RigSession(ours, 0, 0, 0, 0, (), ())
        assert reason_of_end(session).startswith("the rig is gone:")
        ours.close()


# --- one step at a time -------------------------------------------------------------------------


@pytest.fixture
def keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keeper]:
    """A keeper whose agent is played by hand."""
    monkeypatch.setattr(server, "SHARED_SIZE", layout.CONTROL_AREA + 64 * MIB)
    one = Keeper(tmp_path, 1.0)
    ours, theirs = socket.socketpair()
    one.device = ours
    one.wake = server._events(layout.VECTORS)
    one.own = server._events(1)
    one.ready = True
    yield one
    ours.close()
    theirs.close()
    for descriptor in (*one.wake, *one.own):
        os.close(descriptor)
    one.selector.close()
    one.memory.close()


def opened(keeper: Keeper) -> tuple[Session, socket.socket]:
    """A session the agent has not answered yet, and its client."""
    ours, theirs = socket.socketpair()
    session = Session(ours, b'{"memory": 1048576, "vectors": 2}\n')
    keeper.selector.register(ours, 1, lambda: keeper.on_request(session))
    keeper.clients.append(session)
    keeper.waiting.append(session)
    keeper.open_session(session)
    return session, theirs


def connected(keeper: Keeper) -> tuple[Session, socket.socket]:
    """A client that has not said anything yet."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    session = Session(ours, b"")
    keeper.selector.register(ours, 1, lambda: keeper.on_request(session))
    keeper.clients.append(session)
    return session, theirs


def says(keeper: Keeper, session: Session, theirs: socket.socket, words: bytes) -> str:
    """What the keeper answers to *words*."""
    theirs.sendall(words)
    keeper.on_request(session)
    try:
        return theirs.recv(4096).decode()
    except BlockingIOError:
        return ""


REQUEST = b'{"memory": 1048576, "vectors": 2}\n'


def state(keeper: Keeper, session: Session) -> int:
    assert session.index is not None
    return keeper.memory.load(keeper.entry(session.index) + layout.SESSION_STATE)


def agent_says(keeper: Keeper, session: Session, new: int) -> None:
    assert session.index is not None
    keeper.memory.store(keeper.entry(session.index) + layout.SESSION_STATE, new)
    keeper.on_agent()


def test_a_request_may_come_in_pieces(keeper: Keeper) -> None:
    session, theirs = connected(keeper)
    assert says(keeper, session, theirs, REQUEST[:10]) == ""
    assert not keeper.waiting and not keeper.sessions
    assert says(keeper, session, theirs, REQUEST[10:]) == ""
    assert list(keeper.sessions.values()) == [session]
    theirs.close()
    session.connection.close()


def test_a_client_gets_one_session_whatever_it_says(keeper: Keeper) -> None:
    keeper.ready = False
    session, theirs = connected(keeper)
    assert "starting the rig" in says(keeper, session, theirs, REQUEST)
    assert says(keeper, session, theirs, REQUEST) == ""
    assert keeper.waiting == [session]
    keeper.ready = True
    keeper.open_session(session)
    vectors = len(keeper.free_vectors)
    assert says(keeper, session, theirs, REQUEST) == ""
    assert list(keeper.sessions.values()) == [session]
    assert len(keeper.free_vectors) == vectors
    theirs.close()
    session.connection.close()


def test_who_asks_for_the_state_takes_no_session(keeper: Keeper) -> None:
    session, theirs = connected(keeper)
    for _ in range(2):
        account = json.loads(says(keeper, session, theirs, b"status\n"))
        assert (account["state"], account["machines"]) == ("running", 0)
    assert not keeper.served and not keeper.sessions
    theirs.close()
    session.connection.close()


def test_a_client_that_leaves_while_the_agent_opens_its_session(keeper: Keeper) -> None:
    """The agent's OPEN must not hide that there is nobody left: the place would never be free."""
    session, theirs = opened(keeper)
    theirs.close()
    keeper.on_request(session)
    assert state(keeper, session) == layout.SESSION_OPENING, "the agent owns it"
    agent_says(keeper, session, layout.SESSION_OPEN)
    assert state(keeper, session) == layout.SESSION_CLOSING
    assert os.eventfd_read(keeper.wake[0]) >= 2, "and the agent was woken"
    vectors = len(keeper.free_vectors)
    agent_says(keeper, session, layout.SESSION_FREE)
    assert not keeper.sessions
    assert len(keeper.free_vectors) == vectors + 2
    assert keeper.memory._used == [(0, layout.CONTROL_AREA)]


def test_a_client_that_leaves_an_open_session(keeper: Keeper) -> None:
    session, theirs = opened(keeper)
    agent_says(keeper, session, layout.SESSION_OPEN)
    data, descriptors, _, _ = socket.recv_fds(theirs, 65536, 250)
    assert json.loads(data)["vectors"] == [33, 34]
    assert len(descriptors) == 2 + 2 + layout.PEER_VECTORS
    for descriptor in descriptors:
        os.close(descriptor)
    theirs.close()
    keeper.on_request(session)
    assert state(keeper, session) == layout.SESSION_CLOSING
    agent_says(keeper, session, layout.SESSION_FREE)
    assert not keeper.sessions


def test_peer_numbers_end(keeper: Keeper) -> None:
    keeper.next_peer = server.MAXIMUM_PEER
    session, theirs = opened(keeper)
    assert session.peer == 0xFFFE
    theirs.close()
    late, client_end = opened(keeper)
    assert late.index is None
    assert "worn out" in client_end.recv(4096).decode()
    client_end.close()
    late.connection.close()
    session.connection.close()


def test_a_wedged_client_does_not_hold_the_keeper(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CLIENT_SECONDS", 0.05)
    path = str(keeper.directory / "rig.sock")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client_end:
        listener.bind(path)
        listener.listen(1)
        client_end.connect(path)
        keeper.accept(listener)
        (session,) = keeper.clients
        started = time.monotonic()
        for _ in range(20):
            keeper.tell(session, {"progress": "x" * 100_000})
        assert time.monotonic() - started < 10
        keeper.end_session(session)
        assert not keeper.clients


def test_a_qemu_that_takes_nothing_any_more_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "SHARED_SIZE", layout.CONTROL_AREA)
    monkeypatch.setattr(server, "DEVICE_SECONDS", 0.05)
    keeper = Keeper(tmp_path, 1.0)
    keeper.door = socket.socket(socket.AF_UNIX)
    keeper.door.bind(str(tmp_path / "shared.sock"))
    keeper.door.listen(1)
    keeper.selector.register(keeper.door, selectors.EVENT_READ, keeper.on_qemu)
    keeper.process = subprocess.Popen(["/bin/sleep", "60"], stdout=subprocess.PIPE)
    assert keeper.process.stdout is not None
    os.set_blocking(keeper.process.stdout.fileno(), False)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(tmp_path / "shared.sock"))
        keeper.on_qemu()
        with pytest.raises(HvHostError, match="QEMU hangs: it takes no messages"):
            for _ in range(100_000):
                keeper.send_device(1)
    keeper.stop_qemu()
    keeper.selector.close()
    keeper.memory.close()
    assert not (tmp_path / "shared.sock").exists()


def test_a_qemu_that_is_gone_is_a_sentence(keeper: Keeper) -> None:
    assert keeper.device is not None
    keeper.device.shutdown(socket.SHUT_RDWR)
    with pytest.raises(HvHostError, match=r"QEMU died \(Broken pipe\): it printed nothing"):
        keeper.send_device(1)


# --- over the transport -------------------------------------------------------------------------


def test_every_call_ends_when_the_rig_dies(rig: Rig) -> None:
    transport = RemoteTransport(MIB, 1)
    os.kill(rig.qemus()[0], signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(HvHostError, match="the rig's QEMU died"):
            transport.drain_coalesced()
    transport.close()
    transport.close()
    with pytest.raises(HvHostError, match="given its place in the rig back"):
        transport.drain_coalesced()
