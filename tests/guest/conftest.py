"""Real guests. All tests share one rig, in a runtime directory of their own; nothing stays of it.

``HVHOST_TEST_GUESTS`` names the guests, comma separated; tests of the machine around the guest use
the first of them.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

from guest.helpers import Guest, end_rig, processes_of, tell
from hvhost.guests.build import GuestImages, prepare_guest
from hvhost.verify.live import LiveMachine

GUESTS = os.environ.get("HVHOST_TEST_GUESTS", "debian-12").split(",")
RIG_LINGER_SECONDS = 300
RIG_LOST = re.compile(r"the rig's QEMU (died|hangs)|the rig did not start")
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.guest)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """One more try for a test whose rig died or hung under it, said aloud: emulators do that."""
    if HERE not in item.path.parents:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    lost = [r for r in reports if r.failed and RIG_LOST.search(r.longreprtext)]
    if lost:
        words = RIG_LOST.search(lost[0].longreprtext)
        print(f"\n{item.nodeid}: one more try, because {words[0] if words else ''}")
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


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
