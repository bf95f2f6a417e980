"""What the rig's archive is made of."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from hvhost.errors import HvHostError
from hvhost.rig import image
from hvhost.rig.image import bear_accessed_pdpt, rig_kernel, without_signature

BEFORE, AFTER = b"\x48\x8b\x8b\x88\x08\x00\x00", b"\x48\x85\xd1\x0f\x85\xc9\x00\x00\x00"


@pytest.mark.parametrize("opcode", [b"\x48\x0d", b"\x48\x81\xc9", b"\x49\x81\xcc"])
def test_kvm_bears_the_accessed_bit(opcode: bytes) -> None:
    """It is bit 5 of the mask; the others, 1, 2 and 6 to 8, stay reserved."""
    kvm = BEFORE + opcode + b"\xe6\x01\0\0" + AFTER
    assert bear_accessed_pdpt(kvm) == BEFORE + opcode + b"\xc6\x01\0\0" + AFTER


@pytest.mark.parametrize("size", [0, 6, 300])
def test_a_module_goes_without_its_signature(size: int) -> None:
    """Linux refuses a module whose signature is wrong, and takes one that has none."""
    module = BEFORE + b"\x48\x81\xc9\xe6\x01\0\0" + AFTER
    trailer = bytes(8) + size.to_bytes(4, "big") + b"~Module signature appended~\n"
    assert without_signature(module + bytes(size) + trailer) == module
    assert without_signature(module) == module


@pytest.mark.parametrize(
    "kvm",
    [
        b"",
        BEFORE + b"\x0f\x85\xe6\x01\0\0" + AFTER,  # a jump of as many bytes
        2 * (b"\x48\x81\xc9\xe6\x01\0\0" + AFTER),
    ],
)
def test_another_kvm_is_left_alone(kvm: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert bear_accessed_pdpt(kvm) == kvm
    assert "32-bit guests will not start" in caplog.text


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What a suite's package holds, by the suite: a kernel's file name, or none; others fail."""
    held: dict[str, str] = {}

    def download(suite: str, packages: list[str], *, progress: Callable[[str], None]) -> list[Path]:
        if suite not in held:
            raise HvHostError(f"{suite} cannot be reached; look at the network.")
        return [Path(suite)]

    def extract(files: list[Path], progress: Callable[[str], None]) -> Path:
        suite = str(files[0])
        (tmp_path / suite / "boot").mkdir(parents=True)
        if held[suite]:
            (tmp_path / suite / "boot" / held[suite]).touch()
        return tmp_path / suite

    monkeypatch.setattr("hvhost.guests.apt.download", download)
    monkeypatch.setattr("hvhost.guests.deb.extract", extract)
    monkeypatch.setattr(image, "open_kernel", lambda path: path)
    monkeypatch.setattr(image, "cached_vmlinux", lambda path, kernel: path)
    monkeypatch.setattr(image, "find_tree", lambda root: root)
    monkeypatch.setattr(image, "ModuleTree", lambda root: root)
    return held


NEWER, OLDER = "vmlinuz-6.12.9-cloud-amd64", "vmlinuz-6.1.0-32-cloud-amd64"


@pytest.mark.parametrize(
    ("backports", "distribution", "taken"),
    [(NEWER, OLDER, NEWER), (None, OLDER, OLDER), ("", OLDER, OLDER), (NEWER, None, NEWER)],
)
def test_the_rig_has_the_newest_kernel_that_is_offered(
    backports: str | None, distribution: str | None, taken: str, mirror: dict[str, str]
) -> None:
    offers = {"bookworm-backports": backports, "bookworm": distribution}
    mirror.update({suite: name for suite, name in offers.items() if name is not None})
    told: list[str] = []
    assert rig_kernel("linux-image-cloud-amd64", told.append).kernel.name == taken
    assert any("bookworm-backports has no" in line for line in told) == (backports is None)


def test_no_kernel_for_the_rig_is_a_sentence(mirror: dict[str, str]) -> None:
    with pytest.raises(HvHostError, match="bookworm-backports cannot be reached"):
        rig_kernel("linux-image-cloud-amd64", lambda _: None)
    mirror.update({"bookworm-backports": "", "bookworm": ""})
    with pytest.raises(HvHostError, match="linux-image-cloud-amd64 holds no kernel"):
        rig_kernel("linux-image-cloud-amd64", lambda _: None)
