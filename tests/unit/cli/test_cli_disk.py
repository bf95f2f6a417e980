"""``hvhost disk``: what it prints, and the sentences with which it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.test_cli import Hvhost, hvhost
from hvhost.storage.images import open_disk

__all__ = ["hvhost"]

MIB = 1 << 20


@pytest.fixture
def image(hvhost: Hvhost, tmp_path: Path) -> Path:
    path = tmp_path / "a.vhdx"
    assert hvhost("disk", "create", str(path), "64M", "--block-size", "2M").status == 0
    return path


def put(path: Path, offset: int, data: bytes) -> None:
    disk = open_disk(path)
    disk.writev(offset, [memoryview(data)])
    disk.close()


def get(path: Path, offset: int, length: int) -> bytes:
    data = bytearray(length)
    disk = open_disk(path, read_only=True)
    disk.readv(offset, [memoryview(data)])
    disk.close()
    return bytes(data)


def test_info(hvhost: Hvhost, image: Path) -> None:
    shown = hvhost("disk", "info", str(image))
    assert shown.status == 0 and "vhdx, dynamic" in shown.out and "64 MiB" in shown.out
    said = json.loads(hvhost("disk", "info", str(image), "--json").out)
    assert said["size"] == 64 * MIB and said["block_size"] == 2 * MIB
    assert said["parent"] is None and said["in_use_by"] is None
    disk = open_disk(image)
    said = json.loads(hvhost("disk", "info", str(image), "--json").out)
    assert isinstance(said["in_use_by"], int)
    disk.close()


def test_differences_and_merging(hvhost: Hvhost, image: Path) -> None:
    put(image, 0, b"a" * MIB)
    child = image.with_name("b.vhdx")
    said = json.loads(hvhost("disk", "create", "--parent", str(image), str(child), "--json").out)
    assert said["type"] == "differencing" and said["parent"] == str(image)
    put(child, 512, b"b" * 512)
    assert hvhost("disk", "merge", str(child)).status == 0
    assert not child.exists()
    assert get(image, 0, 2048) == b"a" * 512 + b"b" * 512 + b"a" * 1024
    assert "no parent" in hvhost.sentence("disk", "merge", str(image))


def test_an_interrupted_merge_is_done_again(
    hvhost: Hvhost, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hvhost.storage import operations

    put(image, 0, b"a" * (4 * MIB))
    child, sibling = image.with_name("b.vhdx"), image.with_name("c.vhdx")
    for each in (child, sibling):
        assert hvhost("disk", "create", "--parent", str(image), str(each)).status == 0
    put(child, MIB, b"b" * (2 * MIB))

    def cut_off(done: int, total: int) -> None:
        if done >= 2 * MIB:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        operations.merge(child, cut_off)
    expected = b"a" * MIB + b"b" * (2 * MIB) + b"a" * MIB
    assert get(child, 0, 4 * MIB) == expected
    assert "changed since" in hvhost.sentence("disk", "merge", str(sibling))
    operations.merge(child, lambda done, total: None)
    assert get(image, 0, 4 * MIB) == expected


def test_check(hvhost: Hvhost, image: Path) -> None:
    assert hvhost("disk", "check", str(image)).out.endswith("is whole.\n")
    content = bytearray(image.read_bytes())
    content[3 * MIB : 3 * MIB + 8] = (1 << 50 | 6).to_bytes(8, "little")
    image.write_bytes(content)
    found = hvhost("disk", "check", str(image))
    assert found.status == 1 and "damage:" in found.out and "outside the file" in found.out
    errors = json.loads(hvhost("disk", "check", str(image), "--json").out)["errors"]
    assert len(errors) == 1


def test_resize_spares_partitions(hvhost: Hvhost, image: Path) -> None:
    put(image, 20 * MIB, b"z" * 512)
    table = bytearray(512)
    table[446:462] = bytes(
        [0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0, 1, 0]
    )  # from 1 MiB, 32 MiB
    table[510:] = b"\x55\xaa"
    put(image, 0, bytes(table))
    assert "partitions up to 33 MiB" in hvhost.sentence("disk", "resize", str(image), "32M")
    assert json.loads(hvhost("disk", "resize", str(image), "33M", "--json").out)["size"] == 33 * MIB
    assert hvhost("disk", "resize", str(image), "16M", "--force").status == 0
    assert hvhost("disk", "resize", str(image), "1G").status == 0
    assert get(image, 20 * MIB, 512) == bytes(512), "what was cut off is gone"


def test_gpt_counts_too(hvhost: Hvhost, image: Path) -> None:
    table = bytearray(512 * 34)
    table[510:512] = b"\x55\xaa"
    table[512:520] = b"EFI PART"
    table[512 + 72 : 512 + 88] = (2).to_bytes(8, "little") + bytes([128, 0, 0, 0, 128, 0, 0, 0])
    table[1024:1040] = b"t" * 16
    table[1024 + 32 : 1024 + 48] = (2048).to_bytes(8, "little") + (65535).to_bytes(8, "little")
    put(image, 0, bytes(table))
    refusal = hvhost.sentence("disk", "resize", str(image), "32M")
    assert f"({32 * MIB + 33 * 512} bytes)" in refusal


def test_convert_and_compact(hvhost: Hvhost, image: Path) -> None:
    put(image, 4 * MIB, b"c" * MIB)
    for name in ("b.img", "b.vhd", "c.vhdx"):
        made = image.with_name(name)
        assert hvhost("disk", "convert", str(image), str(made)).status == 0
        assert get(made, 4 * MIB - 512, MIB + 1024) == bytes(512) + b"c" * MIB + bytes(512)
        assert made.stat().st_blocks * 512 <= 3 * MIB
    assert "no VHDX" in hvhost.sentence("disk", "compact", str(image.with_name("b.vhd")))
    put(image, 4 * MIB, bytes(MIB))
    before = image.stat().st_size
    assert hvhost("disk", "compact", str(image)).status == 0
    assert image.stat().st_size == before - 2 * MIB


def test_refusals(hvhost: Hvhost, image: Path, tmp_path: Path) -> None:
    new = str(tmp_path / "n.vhdx")
    assert "needs a size" in hvhost.sentence("disk", "create", new)
    for of_ones_own in (["1G"], ["--fixed"], ["--block-size", "2M"], ["--sector-size", "4096"]):
        assert "name only --parent" in hvhost.sentence(
            "disk", "create", new, *of_ones_own, "--parent", str(image)
        )
    assert "power of two" in hvhost.sentence("disk", "create", new, "1G", "--block-size", "3M")
    assert "File exists" in hvhost.sentence("disk", "create", str(image), "1G")
    assert "does not say its format" in hvhost.sentence("disk", "create", str(tmp_path / "n"), "1G")
    assert "is no format" in hvhost.sentence("disk", "info", str(image), "--format", "qcow2")
    assert "No such file" in hvhost.sentence("disk", "info", new)
    other = tmp_path / "q"
    other.write_bytes(b"QFI\xfb" + bytes(1024))
    assert "hvhost disk convert" in hvhost.sentence("disk", "info", str(other))
    disk = open_disk(image)
    assert "because this process" in hvhost.sentence("disk", "resize", str(image), "1G")
    disk.close()
