from __future__ import annotations

from pathlib import Path

import pytest

from hvhost.errors import HvHostError
from hvhost.machine.model import Transport
from hvhost.manager.definition import define


def test_what_a_person_wrote_becomes_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = define(kernel="vmlinuz", initrd=Path("sub/initrd"), memory="1G", transport="rig")
    assert config.kernel == str(tmp_path / "vmlinuz")
    assert config.initrd == str(tmp_path / "sub" / "initrd")
    assert config.memory == 1 << 30
    assert config.transport is Transport.RIG


def test_a_name_is_made_up_once() -> None:
    assert define(kernel="k").name != define(kernel="k").name


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("", "console=ttyS0"),
        ("quiet", "console=ttyS0 quiet"),
        ("console=tty0 quiet", "console=tty0 quiet"),
        ("noconsole=x", "console=ttyS0 noconsole=x"),
    ],
)
def test_a_guest_can_be_heard(given: str, made: str) -> None:
    assert define(kernel="k", command_line=given).command_line == made


def test_what_cannot_be() -> None:
    with pytest.raises(HvHostError, match="memory 'lots' is not a size"):
        define(kernel="k", memory="lots")
    with pytest.raises(HvHostError, match="'xen' is no way to run"):
        define(kernel="k", transport="xen")
    with pytest.raises(HvHostError, match="cannot be a machine's name"):
        define(kernel="k", name="a b")
