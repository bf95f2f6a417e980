"""Processors and clock that stop and go on together, or not at all."""

from __future__ import annotations

from typing import cast

import pytest

from hvhost.errors import HvHostError
from hvhost.partition.processor import Processor
from hvhost.partition.standstill import Standstill


class Fake:
    """Two processors and a clock, and all that is asked of them."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail: dict[str, Exception] = {}
        self.time = 100
        processors = [cast("Processor", FakeProcessor(self, name)) for name in "ab"]
        self.standstill = Standstill(processors, self)

    def did(self, what: str) -> None:
        self.calls.append(what)
        if what in self.fail:
            raise self.fail[what]

    def clock_nanoseconds(self) -> int:
        self.did("clock")
        return self.time

    def set_clock_nanoseconds(self, nanoseconds: int) -> None:
        self.did(f"set {nanoseconds}")


class FakeProcessor:
    def __init__(self, machine: Fake, name: str) -> None:
        self._machine, self._name = machine, name

    def pause(self) -> None:
        self._machine.did(f"pause {self._name}")

    def resume(self) -> None:
        self._machine.did(f"resume {self._name}")


def test_the_clock_stands_while_no_processor_runs() -> None:
    fake = Fake()
    fake.standstill.begin()
    fake.time = 999
    fake.standstill.end(lambda: fake.did("before"))
    stop, go = ["pause a", "pause b", "clock"], ["set 100", "before", "resume a", "resume b"]
    assert fake.calls == stop + go


@pytest.mark.parametrize("step", ["pause b", "clock"])
def test_what_cannot_be_stopped_runs_on(step: str) -> None:
    fake = Fake()
    fake.fail[step] = HvHostError("no")
    with pytest.raises(HvHostError, match="no"):
        fake.standstill.begin()
    paused = [call[-1] for call in fake.calls if call.startswith("pause") and call != step]
    assert [call[-1] for call in fake.calls if call.startswith("resume")] == paused


@pytest.mark.parametrize("error", [OSError(22, "no clock"), HvHostError("gone")])
def test_processors_go_on_whatever_becomes_of_the_clock(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    fake = Fake()
    fake.standstill.begin()
    fake.fail["set 100"] = error
    fake.standstill.end(lambda: fake.did("before"))
    assert fake.calls[-2:] == ["resume a", "resume b"]
    assert ("before" in fake.calls) == isinstance(error, OSError)
    assert str(error) in caplog.text


def test_processors_go_on_if_the_guest_cannot_be_told_the_time() -> None:
    fake = Fake()
    fake.standstill.begin()
    fake.fail["before"] = HvHostError("not answered")
    fake.standstill.end(lambda: fake.did("before"))
    assert fake.calls[-2:] == ["resume a", "resume b"]
