"""Real guests. Tests of one process share a rig, in a runtime directory of their own; it all goes.

``HVHOST_TEST_GUESTS`` names the guests, comma separated; tests of the machine around the guest use
the first of them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

from guest.helpers import Guest, end_rig, processes_of, tell
from hvhost.guests.build import GuestImages, prepare_guest
from hvhost.kvm.detect import why_not_local
from hvhost.verify.live import LiveMachine

GUESTS = os.environ.get("HVHOST_TEST_GUESTS", "debian-12").split(",")
RIG_LINGER_SECONDS = 300
TRIED_TWICE = "tried twice"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.guest)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """One more try for a test that failed on emulated processors, said aloud and counted.

    Emulators lose a guest, or themselves, now and then. Real processors do not: there a failure
    is a failure.
    """
    if HERE not in item.path.parents:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    failures = [report for report in reports if report.failed]
    if failures and why_not_local() is not None:
        lines = failures[0].longreprtext.splitlines() or ["no reason given"]
        item.user_properties.append((TRIED_TWICE, "\n".join(lines[-25:])))
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    failed_first = {
        report.nodeid: reason
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, reason in getattr(report, "user_properties", ())
        if name == TRIED_TWICE
    }
    if not failed_first:
        return
    terminalreporter.section(f"{len(failed_first)} tried twice on emulated processors")
    for test, reason in failed_first.items():
        terminalreporter.write_line(f"{test} failed first:\n{reason}\n")


@pytest.fixture(scope="package", autouse=True)
def runtime() -> Iterator[Path]:
    """A runtime directory for these tests; its path is short, because sockets' paths are."""
    path = Path(tempfile.mkdtemp(prefix="hvg"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HVHOST_RUNTIME_DIR", str(path))
        patch.setenv("HVHOST_RIG_LINGER", str(RIG_LINGER_SECONDS))
        yield path
        end_rig(path)
        assert not processes_of(path), "processes are left"
    shutil.rmtree(path)


@pytest.fixture(scope="package", params=GUESTS)
def images(request: pytest.FixtureRequest) -> GuestImages:
    """Each guest in turn."""
    name: str = request.param
    return prepare_guest(name)


@pytest.fixture(scope="package")
def one() -> GuestImages:
    """The first guest, for tests where any will do."""
    return prepare_guest(GUESTS[0])


Start = Callable[..., Guest]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts guests; see :meth:`Guest.start`. They end with the test."""
    machines: list[LiveMachine] = []

    def begin(images: GuestImages, **settings: object) -> Guest:
        guest = Guest.start(images, **settings)  # type: ignore[arg-type]
        machines.append(guest.machine)
        return guest

    yield begin
    for machine in machines:
        tell(machine)
        machine.kill()


PowerOn = Callable[..., LiveMachine]


@pytest.fixture
def power_on() -> Iterator[PowerOn]:
    """Starts machines without waiting for their guests: :meth:`Guest.power_on`."""
    machines: list[LiveMachine] = []

    def begin(images: GuestImages, name: str | None = None) -> LiveMachine:
        machines.append(Guest.power_on(images, name=name))
        return machines[-1]

    yield begin
    for machine in machines:
        tell(machine)
        machine.kill()
