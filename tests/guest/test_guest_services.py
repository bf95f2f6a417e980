"""What the integration services bear for minutes, which no row of a verification waits for."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from guest.conftest import Start
from guest.helpers import Guest, wait_for
from hvhost.errors import HvHostError
from hvhost.guests.build import GuestImages

SIZE = 300 << 20
WHOLE = "HVHOST_TEST_GUESTS" in os.environ


@pytest.mark.timeout(2500)
def test_a_file_of_several_hundred_megabytes(
    images: GuestImages, start: Start, tmp_path: Path
) -> None:
    """Whole by the guest's own hash. 6 KiB a message: minutes on emulated processors."""
    if not WHOLE:
        pytest.skip("takes minutes; `make test-matrix` runs it")
    if not any("fcopy" in daemon for daemon in images.daemons):
        pytest.skip(f"{images.title} has no file copy daemon")
    source, digest = tmp_path / "large", hashlib.sha256()
    with source.open("wb") as file:
        for _ in range(SIZE >> 20):
            block = os.urandom(1 << 20)
            digest.update(block)
            file.write(block)
    guest: Guest = start(images, cpus=2, memory=1 << 30)
    small = tmp_path / "small"
    small.write_text("small")

    def taken() -> bool:
        try:
            guest.machine.copy(small, "/tmp/copied/small", create_path=True, overwrite=True)
        except HvHostError:
            return False
        return True

    wait_for("the file copy daemon", taken, 60.0)
    done = guest.machine.copy(source, "/tmp/copied/large", create_path=True)
    print(f"{SIZE >> 20} MiB at {SIZE / done.seconds / (1 << 20):.2f} MiB/s")
    assert done.copied == SIZE
    told = guest.run("sha256sum /tmp/copied/large", 600.0)
    assert told.split()[0] == digest.hexdigest()
