from __future__ import annotations

import dataclasses
import os
import stat
from pathlib import Path

import pytest
import read_cpio
import tiny_elf

from hvhost.errors import HvHostError
from hvhost.guests import elf, initramfs
from hvhost.guests.initramfs import InitramfsSpec, build_initramfs
from hvhost.guests.modules import ModuleTree


def program(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(0o755)
    return path


@pytest.fixture
def spec(tmp_path: Path) -> InitramfsSpec:
    tree = tmp_path / "lib/modules/6.1.0-test"
    described: dict[str, dict[str, str]] = {
        "hv_vmbus": {"alias": "acpi*:VMBUS:*"},
        "hv_utils": {"depends": "hv_vmbus", "alias": "vmbus:3160"},
        "hyperv_fb": {"depends": "hv_vmbus", "alias": "vmbus:video"},
        "hyperv_drm": {"depends": "hv_vmbus,drm", "alias": "vmbus:video"},
        "drm": {"depends": ""},
        "unrelated": {"alias": "pci:*"},
    }
    for name, fields in described.items():
        program(tree / f"kernel/{name}.ko", tiny_elf.kernel_module(**fields))
    (tree / "modules.builtin").write_text("kernel/sd_mod.ko\n")
    roots = tmp_path / "libc6"
    needs_loader = tiny_elf.program(needed=("ld-linux-x86-64.so.2",))
    program(roots / "lib/x86_64-linux-gnu/libc.so.6", needs_loader)
    program(roots / "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", tiny_elf.program())
    daemon = tiny_elf.program("/lib64/ld-linux-x86-64.so.2", ("libc.so.6",))
    return InitramfsSpec(
        busybox=program(tmp_path / "busybox", b"#!/bin/sh\nprintf 'sh\\nls\\nbusybox\\ninit\\n'\n"),
        probe=program(tmp_path / "probe", b"probe"),
        modules=ModuleTree(tree),
        daemons=(program(tmp_path / "sbin/hv_kvp_daemon", daemon),),
        library_roots=(roots,),
        title="Debian 12, cloud kernel",
    )


def built(spec: InitramfsSpec) -> dict[str, read_cpio.Item]:
    return read_cpio.read(build_initramfs(spec).read_bytes())


BASE = "lib/modules/6.1.0-test"


def test_only_modules_that_matter_are_there_with_what_they_need(spec: InitramfsSpec) -> None:
    items = built(spec)
    found = {name.rsplit("/", 1)[1] for name in items if name.endswith(".ko")}
    assert found == {"hv_vmbus.ko", "hv_utils.ko", "hyperv_fb.ko", "hyperv_drm.ko", "drm.ko"}
    assert items[f"{BASE}/modules.builtin"].data == b"kernel/sd_mod.ko\n"


def test_modprobe_finds_dependencies_and_aliases(spec: InitramfsSpec) -> None:
    items = built(spec)
    dependencies = items[f"{BASE}/modules.dep"].data.decode().splitlines()
    assert "hv_vmbus.ko:" in dependencies
    assert "hv_utils.ko: hv_vmbus.ko" in dependencies
    assert "hyperv_drm.ko: drm.ko hv_vmbus.ko" in dependencies
    aliases = items[f"{BASE}/modules.alias"].data.decode().splitlines()
    assert "alias acpi*:VMBUS:* hv_vmbus" in aliases


def test_the_newer_of_two_drivers_gets_the_screen(spec: InitramfsSpec) -> None:
    assert spec.modules is not None
    aliases = built(spec)[f"{BASE}/modules.alias"].data.decode()
    assert "alias vmbus:video hyperv_drm" in aliases
    assert "alias vmbus:video hyperv_fb" not in aliases
    (spec.modules.root / "kernel/hyperv_drm.ko").unlink()
    older = dataclasses.replace(spec, modules=ModuleTree(spec.modules.root))
    assert "alias vmbus:video hyperv_fb" in built(older)[f"{BASE}/modules.alias"].data.decode()


def test_daemons_come_with_their_libraries(spec: InitramfsSpec) -> None:
    items = built(spec)
    assert items["usr/sbin/hv_kvp_daemon"].mode == stat.S_IFREG | 0o755
    assert items["lib/libc.so.6"].data.startswith(b"\x7fELF")
    loader = items["lib64/ld-linux-x86-64.so.2"]
    assert loader.data.startswith(b"\x7fELF")
    assert loader.mode & 0o111
    assert "lib/ld-linux-x86-64.so.2" not in items, "one copy of it will do"


def test_libraries_are_read_once_and_may_need_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = {"liba.so.1": ("libb.so.1",), "libb.so.1": ("liba.so.1", "ld.so"), "ld.so": ()}
    for name, needed in needs.items():
        program(tmp_path / "lib" / name, tiny_elf.program(needed=needed))
    programs = [
        program(tmp_path / f"bin/{name}", tiny_elf.program("/lib64/ld.so", ("liba.so.1",)))
        for name in ("one", "other")
    ]
    read: list[elf.Linkage] = []
    linkage = elf.linkage

    def watched(data: bytes) -> elf.Linkage:
        read.append(linkage(data))
        return read[-1]

    monkeypatch.setattr(elf, "linkage", watched)
    found = initramfs.libraries_of(programs, [tmp_path])
    assert sorted(found) == ["lib/liba.so.1", "lib/libb.so.1", "lib64/ld.so"]
    assert len(read) == 5


def test_an_older_libc_comes_with_what_it_opens_at_run_time(spec: InitramfsSpec) -> None:
    assert "lib/libnss_files.so.2" not in built(spec)
    library = spec.library_roots[0] / "lib/x86_64-linux-gnu/libnss_files.so.2"
    program(library, tiny_elf.program())
    items = built(dataclasses.replace(spec, title="Debian 11"))
    assert items["lib/libnss_files.so.2"].data.startswith(b"\x7fELF")
    assert items["etc/nsswitch.conf"].data.startswith(b"passwd: files")


def test_a_library_nobody_has_is_named(spec: InitramfsSpec) -> None:
    lost = dataclasses.replace(spec, library_roots=())
    with pytest.raises(HvHostError, match=r"library libc\.so\.6"):
        build_initramfs(lost)


def test_init_and_its_parts(spec: InitramfsSpec) -> None:
    items = built(spec)
    assert items["init"].data == b"bin/busybox"
    assert items["bin/sh"].data == b"busybox"
    assert "bin/busybox" in items
    assert stat.S_ISREG(items["bin/busybox"].mode)
    for name in ("poweroff", "reboot", "modprobe"):  # paths the kernel itself runs
        assert items[f"sbin/{name}"].data == b"../bin/busybox"
    assert items["dev/console"].device == (5, 1)
    inittab = items["etc/inittab"].data.decode()
    assert "::respawn:/sbin/hvhost-probe /dev/ttyS1\n" in inittab
    assert "::shutdown:/etc/rcK\n" in inittab
    assert "askfirst" in inittab
    quiet = dataclasses.replace(spec, console_shell=False)
    assert "askfirst" not in built(quiet)["etc/inittab"].data.decode()
    assert b"modprobe -q -a hv_vmbus hv_utils\n" in items["etc/load-drivers"].data
    assert items["etc/load-drivers"].mode & 0o111
    assert b"shutdown path of init" in items["etc/rcK"].data
    assert b'VERSION_ID="12"' in items["etc/os-release"].data


def test_every_parent_comes_before_its_children(spec: InitramfsSpec) -> None:
    seen: set[str] = set()
    for name, item in built(spec).items():
        parent = name.rpartition("/")[0]
        assert parent == "" or parent in seen, name
        if stat.S_ISDIR(item.mode):
            seen.add(name)


def test_a_kernel_without_modules_has_no_modprobe_line(spec: InitramfsSpec) -> None:
    items = built(dataclasses.replace(spec, modules=None))
    assert not [name for name in items if name.startswith("lib/modules")]
    assert b"modprobe" not in items["etc/load-drivers"].data


def test_modules_whose_needs_are_gone_are_left_out(spec: InitramfsSpec) -> None:
    assert spec.modules is not None
    root = spec.modules.root
    (root / "kernel/hv_vmbus.ko").unlink()
    items = built(dataclasses.replace(spec, modules=ModuleTree(root)))
    assert not [name for name in items if name.endswith(".ko")]
    assert b"modprobe" not in items["etc/load-drivers"].data


def test_built_in_drivers_are_not_loaded(spec: InitramfsSpec) -> None:
    assert spec.modules is not None
    (spec.modules.root / "modules.builtin").write_text("kernel/hv_vmbus.ko\n")
    (spec.modules.root / "kernel/hv_vmbus.ko").unlink()
    items = built(dataclasses.replace(spec, modules=ModuleTree(spec.modules.root)))
    assert b"modprobe -q -a hv_utils\n" in items["etc/load-drivers"].data


def test_extra_files_keep_whether_they_run(spec: InitramfsSpec, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("x")
    items = built(
        dataclasses.replace(spec, extra_files=(("opt/a/run", spec.probe), ("opt/text", text)))
    )
    assert items["opt/a/run"].mode == stat.S_IFREG | 0o755
    assert items["opt/text"].mode == stat.S_IFREG | 0o644


def test_it_is_made_once_and_again_when_a_part_changes(spec: InitramfsSpec) -> None:
    said: list[str] = []
    first = build_initramfs(spec, said.append)
    assert build_initramfs(spec, said.append) == first
    assert len(said) == 1
    spec.probe.write_bytes(b"other")
    assert build_initramfs(spec) != first
    assert build_initramfs(dataclasses.replace(spec, title="Other")) != first
    assert build_initramfs(dataclasses.replace(spec, module_names=("hv_vmbus",))) != first


def test_the_same_parts_give_the_same_bytes(
    spec: InitramfsSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_initramfs(spec).read_bytes()
    monkeypatch.setenv("HVHOST_CACHE_DIR", str(tmp_path / "second"))
    assert build_initramfs(spec).read_bytes() == first


def test_a_busybox_that_does_not_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(HvHostError, match="static busybox"):
        initramfs.applets(program(tmp_path / "busybox", os.urandom(10)))
