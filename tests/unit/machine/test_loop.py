from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator

import pytest

from hvhost.errors import HvHostError
from hvhost.machine.loop import Loop


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    yield ends
    for end in ends:
        os.close(end)


def finish(loop: Loop, seconds: float = 5.0) -> None:
    """Run until somebody stops the loop."""
    loop.call_later(seconds, lambda: pytest.fail("nobody stopped the loop"))
    started = time.monotonic()
    loop.run()
    assert time.monotonic() - started < seconds


def test_readers(loop: Loop, pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    seen: list[bytes] = []

    def read() -> None:
        seen.append(os.read(reader, 10))
        loop.stop()

    loop.add_reader(reader, read)
    os.write(writer, b"abc")
    finish(loop)
    assert seen == [b"abc"]


def test_writers(loop: Loop, pipe: tuple[int, int]) -> None:
    loop.add_writer(pipe[1], loop.stop)
    finish(loop)


def test_a_second_callback_replaces_the_first(loop: Loop, pipe: tuple[int, int]) -> None:
    seen: list[int] = []
    loop.add_reader(pipe[0], lambda: seen.append(1))
    loop.add_reader(pipe[0], lambda: seen.append(2))
    loop.call_later(0.05, loop.stop)
    os.write(pipe[1], b"x")
    finish(loop)
    assert set(seen) == {2}


def test_a_descriptor_removed_by_another_callback_is_left_alone(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    """Both are ready in the same round; the first one takes the other away."""
    ends = [os.eventfd(1) for _ in range(2)]
    seen: list[int] = []

    def callback(mine: int, other: int) -> None:
        seen.append(mine)
        loop.remove(other)
        loop.remove(mine)
        loop.call_soon_threadsafe(loop.stop)

    for mine, other in (ends, ends[::-1]):
        loop.add_reader(mine, lambda mine=mine, other=other: callback(mine, other))  # type: ignore[misc]
    finish(loop)
    assert len(seen) == 1
    assert not caplog.records
    for end in ends:
        loop.remove(end)
        os.close(end)


def test_calls_from_another_thread_wake_the_loop(loop: Loop) -> None:
    order: list[int] = []

    def from_elsewhere() -> None:
        time.sleep(0.05)
        for number in range(1000):
            loop.call_soon_threadsafe(lambda number=number: order.append(number))  # type: ignore[misc]
        loop.call_soon_threadsafe(loop.stop)

    thread = threading.Thread(target=from_elsewhere)
    thread.start()
    finish(loop)
    thread.join()
    assert order == list(range(1000))


def test_a_stop_from_another_thread(loop: Loop) -> None:
    timer = threading.Timer(0.05, loop.stop)
    timer.start()
    finish(loop)


def test_timers_run_in_the_order_of_their_times(loop: Loop) -> None:
    order: list[str] = []
    loop.call_later(0.03, loop.stop)
    loop.call_later(0.01, lambda: order.append("first"))
    loop.call_later(0.01, lambda: order.append("second"))
    started = time.monotonic()
    finish(loop)
    assert order == ["first", "second"]
    assert time.monotonic() - started >= 0.03


def test_a_timer_is_not_early_and_costs_no_spinning(loop: Loop) -> None:
    started = time.monotonic()
    loop.call_later(0.2, loop.stop)
    finish(loop)
    assert time.monotonic() - started >= 0.2
    assert loop.wake_ups <= 4


def test_timers_that_ask_for_themselves_let_others_live(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the clock stands still between two looks at it."""
    rounds = 0

    def again() -> None:
        nonlocal rounds
        rounds += 1
        loop.call_later(0, again)
        if rounds == 5:
            loop.call_soon_threadsafe(loop.stop)
        assert rounds < 100, "nobody else gets a turn"

    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    loop.call_later(0, again)
    loop.run()
    assert rounds == 5


def test_a_timer_in_a_century(loop: Loop) -> None:
    loop.call_later(3e9, lambda: None)
    threading.Timer(0.05, loop.stop).start()
    loop.run()


def test_an_idle_loop_sleeps(loop: Loop) -> None:
    threading.Timer(0.3, loop.stop).start()
    loop.run()
    assert loop.wake_ups <= 2


def test_a_callback_that_fails_ends_nothing(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    def bug() -> None:
        raise RuntimeError("a bug")

    def sentence() -> None:
        raise HvHostError("the rig is gone.")

    for callback in (bug, sentence, loop.stop):
        loop.call_soon_threadsafe(callback)
    with caplog.at_level(logging.WARNING):
        finish(loop)
    assert [bool(record.exc_info) for record in caplog.records] == [True, False]
    assert caplog.messages == ["in the worker's loop", "the rig is gone."]


def test_remove_of_what_is_not_there(loop: Loop, pipe: tuple[int, int]) -> None:
    loop.remove(pipe[0])
    loop.add_reader(pipe[0], lambda: None)
    loop.remove(pipe[0])
    loop.remove(pipe[0])


def test_it_runs_again_after_a_stop(loop: Loop) -> None:
    for _ in range(2):
        loop.call_soon_threadsafe(loop.stop)
        finish(loop)
