from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_elf
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from hvhost.errors import HvHostError
from hvhost.guests import modules
from hvhost.guests.modules import ModuleTree, find_tree, parse_modinfo

NETVSC = "vmbus:635161f83edfc546913ff2d2f965ed0e"


def add(tree: Path, place: str, **fields: str | list[str]) -> Path:
    path = tree / "kernel" / place
    path.parent.mkdir(parents=True, exist_ok=True)
    pack: dict[str, Callable[[bytes], bytes]] = {
        ".ko": bytes,
        ".xz": lzma.compress,
        ".gz": gzip.compress,
        ".zst": zstandard.ZstdCompressor().compress,
    }
    path.write_bytes(pack[path.suffix](tiny_elf.kernel_module(**fields)))
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "lib/modules/6.1.0-test"
    add(tree, "drivers/hv/hv_vmbus.ko", alias=["acpi*:VMBUS:*", "acpi*:MSFT1000:*"])
    add(tree, "drivers/hv/hv-utils.ko.xz", depends="hv_vmbus", alias="vmbus:3160*")
    add(tree, "drivers/net/hv_netvsc.ko.zst", depends="hv_vmbus,failover", alias=NETVSC)
    add(tree, "net/failover.ko.gz", depends="")
    add(tree, "fs/ext4.ko", depends="jbd2,mbcache", softdep="pre: crc32c post: later")
    add(tree, "fs/jbd2.ko", depends="")
    add(tree, "lib/crc32c_generic.ko", alias=["crypto-crc32c", "crc32c"])
    (tree / "modules.builtin").write_text("kernel/fs/mbcache.ko\nkernel/drivers/input/serio.ko\n")
    (tree / "modules.builtin.modinfo").write_bytes(
        b"serio.alias=serio:ty*\0serio.license=GPL\0late_builtin.alias=vmbus:aaaa*\0"
    )
    return tree


def names(found: list[modules.Module]) -> list[str]:
    return [module.name for module in found]


def test_what_a_module_needs_comes_before_it(tree: Path) -> None:
    found = ModuleTree(tree)
    assert names(found.closure(["hv_netvsc"])) == ["hv_vmbus", "failover", "hv_netvsc"]
    assert names(found.closure(["hv-utils", "hv_netvsc"])) == [
        "hv_vmbus",
        "hv_utils",
        "failover",
        "hv_netvsc",
    ]


def test_soft_dependencies_by_alias_come_first_and_built_in_ones_are_left_out(tree: Path) -> None:
    assert names(ModuleTree(tree).closure(["ext4"])) == ["crc32c_generic", "jbd2", "ext4"]


def test_dependencies_in_a_circle_end(tree: Path) -> None:
    add(tree, "a.ko", depends="b")
    add(tree, "b.ko", depends="a")
    assert sorted(names(ModuleTree(tree).closure(["a"]))) == ["a", "b"]


def test_a_module_the_kernel_lacks_is_named(tree: Path) -> None:
    found = ModuleTree(tree)
    with pytest.raises(HvHostError, match=r"6\.1\.0-test has no module hv_storvsc"):
        found.closure(["hv_storvsc"])
    add(tree, "x.ko", depends="nothing_like_it")
    with pytest.raises(HvHostError, match="nothing_like_it"):
        ModuleTree(tree).closure(["x"])


def test_drivers_are_found_by_the_device(tree: Path) -> None:
    found = ModuleTree(tree)
    assert found.driver_for(NETVSC) == "hv_netvsc"
    assert found.driver_for("vmbus:6351*") == "hv_netvsc"
    assert found.driver_for("acpi:VMBUS:") == "hv_vmbus"
    assert found.driver_for("serio:ty06pr00id00ex00") == "serio"
    assert found.driver_for("vmbus:aaaabbbb") == "late_builtin"
    assert found.driver_for("vmbus:ffff") is None
    add(tree, "drivers/second.ko", alias="vmbus:*")
    assert ModuleTree(tree).drivers_for(NETVSC) == ["hv_netvsc", "second"]


def test_a_pattern_with_an_early_wildcard_still_matches(tree: Path) -> None:
    add(tree, "drivers/any.ko", alias="*:everything")
    assert ModuleTree(tree).driver_for("pci:everything") == "any"


def test_dashes_and_underscores_are_the_same(tree: Path) -> None:
    found = ModuleTree(tree)
    assert (
        found.path("hv_utils")
        == found.path("hv-utils")
        == tree / ("kernel/drivers/hv/hv-utils.ko.xz")
    )
    assert found.is_builtin("mbcache")
    assert not found.is_builtin("ext4")
    assert "ext4" in found
    assert "serio" in found
    assert "btrfs" not in found
    assert found.module("serio") is None


@pytest.mark.parametrize("name", ["hv_vmbus", "hv_utils", "hv_netvsc", "failover"])
def test_every_compression_is_undone(tree: Path, name: str) -> None:
    found = ModuleTree(tree)
    assert modules.read_module(found.path(name))[:4] == b"\x7fELF"


def test_the_index_is_kept_and_made_again_when_the_tree_changes(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ModuleTree(tree)
    described: list[str] = []
    real = modules._describe

    def watched(root: Path, path: str) -> modules.Module:
        described.append(path)
        return real(root, path)

    monkeypatch.setattr(modules, "_describe", watched)
    again = ModuleTree(tree)
    assert described == []
    assert again.closure(["hv_netvsc"]) == first.closure(["hv_netvsc"])
    assert again.driver_for("serio:ty06") == "serio"
    add(tree, "new.ko", alias="vmbus:ffff")
    assert ModuleTree(tree).driver_for("vmbus:ffff") == "new"


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"version": 1}'])
def test_a_damaged_index_is_made_again(tree: Path, private_cache: Path, damage: bytes) -> None:
    ModuleTree(tree)
    (index,) = (private_cache / "modules").iterdir()
    index.write_bytes(damage)
    assert ModuleTree(tree).driver_for(NETVSC) == "hv_netvsc"


@pytest.mark.parametrize("place", ["bad.ko", "bad.ko.xz", "bad.ko.zst", "bad.ko.gz"])
def test_a_damaged_module_is_named(tree: Path, place: str) -> None:
    (tree / "kernel" / place).write_bytes(b"not a module at all")
    with pytest.raises(HvHostError, match=r"bad\.ko"):
        ModuleTree(tree)


def test_a_directory_without_modules_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(HvHostError, match="lib/modules/RELEASE"):
        ModuleTree(tmp_path / "none")
    with pytest.raises(HvHostError, match="lib/modules/RELEASE"):
        find_tree(tmp_path)


def test_modules_alone_and_a_kernel_with_everything_built_in(tree: Path, tmp_path: Path) -> None:
    """A build's own modules come without ``modules.builtin``; some kernels with that only."""
    built_in = tmp_path / "other/6.2"
    built_in.mkdir(parents=True)
    for name in ("modules.builtin", "modules.builtin.modinfo"):
        (tree / name).rename(built_in / name)
    assert "hv_netvsc" in ModuleTree(find_tree(tree))
    assert "serio" not in ModuleTree(tree)
    assert find_tree(tmp_path / "other") == built_in
    assert ModuleTree(built_in).is_builtin("serio")


def test_links_to_the_sources_are_not_followed(tree: Path) -> None:
    (tree / "build").mkdir()
    (tree / "build/other.ko").write_bytes(b"not a module")
    assert "other" not in ModuleTree(tree)


def test_the_tree_is_found_from_above(tree: Path, tmp_path: Path) -> None:
    assert find_tree(tree) == tree
    assert find_tree(tmp_path, "6.1.0-test") == tree
    assert find_tree(tmp_path / "lib/modules") == tree
    with pytest.raises(HvHostError, match=r"are of 6\.1\.0-test, the\s+kernel is 6\.2"):
        find_tree(tmp_path, "6.2")
    (tmp_path / "lib/modules/6.2/kernel").mkdir(parents=True)
    with pytest.raises(HvHostError, match="several kernels"):
        find_tree(tmp_path)
    assert find_tree(tmp_path, "6.1.0-test") == tree


@given(st.binary())
def test_any_bytes_are_parsed_as_modinfo(content: bytes) -> None:
    assert all("\0" not in key + value for key, value in parse_modinfo(content))


@pytest.mark.parametrize("place", ["boot/config-{}", "lib/modules/{}/config"])
def test_options_are_read_from_the_configuration(tmp_path: Path, place: str) -> None:
    root = tmp_path / "lib/modules/6.1.0"
    (root / "kernel").mkdir(parents=True)
    (root / "modules.builtin").write_text("")
    tree = ModuleTree(root)
    assert tree.option("CONFIG_MEMORY_HOTPLUG") is None
    config = tmp_path / place.format("6.1.0")
    config.parent.mkdir(exist_ok=True)
    config.write_text("CONFIG_A=y\nCONFIG_B=m\n# CONFIG_C is not set\nCONFIG_AB=n\n")
    options = [f"CONFIG_{name}" for name in ("A", "B", "C", "AB", "D")]
    assert [tree.option(name) for name in options] == [True, True, False, False, False]


def test_a_module_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "hv_vmbus.ko"
    with pytest.raises(HvHostError) as caught:
        modules.read_module(path)
    assert str(caught.value) == (
        f"The module {path} cannot be read (No such file or directory); install it again."
    )
