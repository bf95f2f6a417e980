"""What docs/storage.md has people type does what it says, with a real guest."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from guest import pages
from guest.matrix import only_in_matrix
from hvhost.storage.images import create_disk
from hvhost.verify.iso import iso_image

NAME = "demo"
inside = functools.partial(pages.inside, NAME)

pytestmark = [only_in_matrix("guests to boot"), pytest.mark.timeout(900)]


def addresses() -> list[str]:
    return [each["address"] for each in json.loads(pages.do(["drive", NAME, "list", "--json"]))]


def test_drives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("debian.iso").write_bytes(iso_image("debian", {"README": b"hello"}))
    create_disk(Path("more.img"), 8 << 20).close()
    create, run, listing, add, resize, remove = pages.commands("storage.md", "Storage")
    with pages.ended(NAME):
        pages.do(create)
        pages.do(run)
        assert "scsi0:0" in pages.do(listing)
        size = "cat /sys/block/sda/size"
        assert inside(size) == f"{20 << 21}\n"
        pages.do(add)
        assert addresses() == ["scsi0:0", "scsi0:1", "scsi0:5"]
        pages.do(resize)
        inside(f"until [ $({size}) = {40 << 21} ]; do sleep 0.2; done")
        pages.do(remove)
        assert addresses() == ["scsi0:0", "scsi0:1"]


def test_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pages.do(["disk", "create", "data.vhdx", "1G"])
    run, listing = pages.commands("storage.md", "A process of its own")
    with pages.ended(NAME):
        pages.do(run)
        assert "data.vhdx" in pages.do(listing)
        worker = json.loads(pages.do(["info", NAME, "--json"]))["pid"]
        children = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()
        commands = [Path(f"/proc/{each}/cmdline").read_text() for each in children]
        assert [each for each in commands if "hvhost.storage.process" in each]
        inside("echo stored | dd of=/dev/sda bs=512 conv=sync,fsync 2>/dev/null")
        inside("echo 3 >/proc/sys/vm/drop_caches")
        assert inside("head -n 1 /dev/sda") == "stored\n"
