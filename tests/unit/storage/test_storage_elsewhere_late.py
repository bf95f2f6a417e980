"""What a storage process says too late, or of nothing: the process and its link are played."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import pytest

from hvhost.machine.computer import Computer
from hvhost.machine.link import Failure, Received
from hvhost.machine.loop import Loop
from hvhost.machine.model import MachineConfig
from hvhost.machine.peripheral import Surroundings
from hvhost.storage import elsewhere, messages
from hvhost.storage.elsewhere import StorageElsewhere


class PlayedLink:
    """A link on which only what is said here is heard; ``answers`` are ours, by their numbers."""

    def __init__(self, *_: object) -> None:
        self.answers: list[tuple[int, Any]] = []

    def start(self) -> None: ...

    def request(self, *_: object, **__: object) -> None: ...

    def reply(self, number: int, message: Any) -> None:
        self.answers.append((number, message))

    def serve(self, number: int, function: Callable[[], Any]) -> None:
        try:
            self.reply(number, function())
        except Exception as error:
            self.reply(number, Failure.of(error))

    def close(self) -> None: ...


class PlayedProcess:
    """A process that ends when it is told to, unless it has its ``status`` already."""

    pid = 7

    def __init__(self, *_: object, **__: object) -> None:
        self.killed = False
        self.status: int | None = None

    def kill(self) -> None:
        self.killed = True

    def wait(self, timeout: float = 0.0) -> int:
        if self.status is not None:
            return self.status
        return -9 if self.killed else 0


class PlayedLoop:
    """Does what it is asked to do when :meth:`turn` says so."""

    def __init__(self) -> None:
        self.later: list[Callable[[], None]] = []

    def call_soon_threadsafe(self, function: Callable[[], None]) -> None:
        self.later.append(function)

    def turn(self) -> None:
        later, self.later = self.later, []
        for each in later:
            each()


class PlayedComputer:
    """As much of a computer as is asked here; ``why`` it failed."""

    def __init__(self) -> None:
        self.lock, self.why = threading.RLock(), list[str]()

    def fail(self, why: str) -> None:
        self.why.append(why)

    def require_running(self) -> None: ...


class Played:
    """A storage elsewhere between these."""

    def __init__(self, directory: Path) -> None:
        self.loop = PlayedLoop()
        config = MachineConfig("m1", "/vmlinuz", storage_process=True)
        self.storage = StorageElsewhere(
            Surroundings(config, cast("Loop", self.loop), directory, lambda *_: None)
        )
        self.link = cast("PlayedLink", self.storage._link)
        self.process = cast("PlayedProcess", self.storage.process)

    def run(self) -> PlayedComputer:
        """Another computer from now on."""
        computer = PlayedComputer()
        self.storage._computer = cast("Computer", computer)
        return computer

    def hear(self, message: Any, number: int = 0) -> None:
        self.storage._received(Received(message, number))


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Played:
    monkeypatch.setattr(elsewhere, "Link", PlayedLink)
    monkeypatch.setattr("hvhost.storage.elsewhere.subprocess.Popen", PlayedProcess)
    return Played(tmp_path)


NOT_FROZEN = messages.Result("false")


def test_a_question_that_the_guest_of_before_was_asked(played: Played) -> None:
    """The one that runs now was not frozen, whatever the service knows."""
    played.storage._vss = cast("Any", type("Vss", (), {"still_frozen": True}))
    played.run()
    played.hear(messages.StillFrozen(), 1)
    played.loop.turn()
    assert played.link.answers == [(1, messages.Result("true"))]
    played.hear(messages.StillFrozen(), 2)
    played.run()
    played.loop.turn()
    assert played.link.answers[1:] == [(2, NOT_FROZEN)]


def test_a_question_between_two_computers(played: Played) -> None:
    played.hear(messages.StillFrozen(), 1)
    played.loop.turn()
    played.hear(messages.RequireRunning(), 2)
    (frozen, running) = played.link.answers
    assert frozen == (1, NOT_FROZEN)
    assert running[0] == 2 and "is being reset; try again" in running[1].text


def test_a_question_at_the_end_has_one_answer(played: Played) -> None:
    """That nobody is there any more; the loop's turn, if it comes still, adds nothing."""
    played.run()
    played.hear(messages.StillFrozen(), 1)
    played.storage.close()
    assert played.link.answers == [(1, NOT_FROZEN)]
    played.loop.turn()
    assert played.link.answers == [(1, NOT_FROZEN)]


def test_a_process_that_ends_as_it_should(played: Played) -> None:
    computer = played.run()
    played.storage.close()
    played.storage._link_ended()
    played.loop.turn()
    assert not played.process.killed and computer.why == []


@pytest.mark.parametrize(
    ("status", "said"),
    [(None, "signal 9, SIGKILL"), (-11, "signal 11, SIGSEGV"), (1, "exit status 1")],
)
def test_a_process_that_ends_by_itself(played: Played, status: int | None, said: str) -> None:
    """It takes along the computer that it served, and nothing between two of them."""
    computer = played.run()
    played.process.status = status
    played.storage._link_ended()
    played.loop.turn()
    assert played.process.killed
    (why,) = computer.why
    assert why == f"the storage process ended ({said}); start the machine again."
    played.storage._computer = None
    played.storage._link_ended()
    played.loop.turn()
    assert computer.why == [why]


def test_faults_of_channels_that_are_none(played: Played) -> None:
    """One was never offered, and one is not on the bus yet."""
    computer = played.run()
    played.hear(messages.Offered(3, UUID(int=1), UUID(int=2), "scsi0", 0))
    played.loop.later.clear()  # the turn in which it would be added
    for key in (2, 3):
        played.hear(messages.Faulted(key, 0, "the ring is broken."))
        played.loop.turn()
    assert computer.why == [] and played.storage._channels[3].channel is None
    played.storage.detach()
