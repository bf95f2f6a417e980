from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import read_cpio
import tiny_deb
import tiny_elf

from hvhost.errors import HvHostError
from hvhost.guests import apt, build, catalog
from hvhost.guests.build import kernel_release, prepare_guest
from hvhost.guests.programs import Programs
from hvhost.manager.definition import define_guest

RELEASE = "6.1.0-test"


def bzimage(release: str = RELEASE, *, bits: int = 64) -> bytes:
    data = bytearray(0x800)
    data[0x1F1], data[0x1F4] = 1, 0x40  # one sector of setup code, 1 KiB of kernel behind it
    data[0x1FE:0x202] = b"\x55\xaa\xeb\x66"
    data[0x202:0x206] = b"HdrS"
    data[0x206:0x208] = (0x20F).to_bytes(2, "little")
    data[0x211], data[0x236] = 1, bits == 64
    data[0x20E:0x210] = (0x400).to_bytes(2, "little")
    text = f"{release} (builder@host) #1 SMP".encode() + b"\0"
    data[0x600 : 0x600 + len(text)] = text
    return bytes(data)


def kernel_files(release: str = RELEASE) -> dict[str, bytes]:
    return {
        f"boot/vmlinuz-{release}": bzimage(release),
        f"lib/modules/{release}/kernel/hv_vmbus.ko": tiny_elf.kernel_module(alias="acpi*:VMBUS:*"),
        f"lib/modules/{release}/modules.builtin": b"kernel/serio.ko\n",
    }


@pytest.fixture(autouse=True)
def packages_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for the mirror; what was asked of it."""
    asked: list[str] = []
    daemon = tiny_elf.program("/lib64/ld-linux-x86-64.so.2", ("libc.so.6",))
    contents = {
        "linux-image-cloud-amd64": kernel_files(),
        "linux-image-686-pae": kernel_files() | {f"boot/vmlinuz-{RELEASE}": bzimage(bits=32)},
        "busybox-static": {"bin/busybox": b"#!/bin/sh\necho sh\n"},
        "hyperv-daemons": {"usr/sbin/hv_kvp_daemon": daemon, "usr/sbin/other": b"x"},
        "chrony": {"usr/sbin/chronyd": daemon, "usr/bin/chronyc": b"x"},
        "ethtool": {"usr/sbin/ethtool": daemon},
        "libc6": {
            "lib/x86_64-linux-gnu/libc.so.6": tiny_elf.program(),
            "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2": tiny_elf.program(),
        },
    }

    def download(
        suite: str,
        names: Sequence[str],
        *,
        architecture: str = apt.NATIVE,
        refresh: bool = False,
        progress: apt.Progress,
    ) -> list[Path]:
        paths = []
        for name in names:
            kind = "" if architecture == apt.NATIVE else f":{architecture}"
            asked.append(f"{suite} {name}{kind}")
            path = tmp_path / f"mirror/{name}_1_amd64.deb"
            if not path.exists():
                tiny_deb.write(path, tiny_deb.files(contents.get(name, {})))
            paths.append(path)
        return paths

    monkeypatch.setattr(apt, "download", download)
    monkeypatch.setattr(build, "build_programs", programs)
    return asked


def programs(architecture: str, progress: apt.Progress = apt.silent) -> Programs:
    """No compiler needed; the real ones have tests of their own."""
    source = Path(__file__)
    return Programs(source, ((f"usr/bin/hvhost-clock-{architecture}", source),))


def test_a_guest_of_the_catalogue(packages_without_network: list[str]) -> None:
    images = prepare_guest()
    assert images.command_line == ""
    assert packages_without_network[0] == "bookworm linux-image-cloud-amd64"
    assert images.kernel.name == f"vmlinuz-{RELEASE}"
    assert images.release == RELEASE
    assert images.title == "Debian 12, cloud kernel"
    assert images.daemons == ("hv_kvp_daemon", "chronyd", "ethtool")
    assert images.daemons_of == "debian-12"
    assert images.modules is not None
    assert images.modules.driver_for("acpi:VMBUS:") == "hv_vmbus"
    items = read_cpio.read(images.initrd.read_bytes())
    assert f"lib/modules/{RELEASE}/hv_vmbus.ko" in items
    assert {"sbin/hvhost-probe", "usr/sbin/chronyd", "usr/bin/hvhost-clock-amd64"} <= items.keys()


def test_a_32_bit_guest(packages_without_network: list[str]) -> None:
    images = prepare_guest("debian-12-pae")
    assert packages_without_network[:2] == [
        "bookworm linux-image-686-pae:i386",
        "bookworm hyperv-daemons:i386",
    ]
    assert all(each.endswith(":i386") for each in packages_without_network)
    assert (images.architecture, images.title) == ("i386", "Debian 12, 32-bit kernel")
    assert images.command_line == "spectre_v2=off"
    line = define_guest("debian-12-pae", command_line="debug").command_line
    assert line == "console=ttyS0 spectre_v2=off debug"
    assert "usr/bin/hvhost-clock-i386" in read_cpio.read(images.initrd.read_bytes())


def test_packages_that_lost_their_busybox(
    tmp_path: Path, packages_without_network: list[str]
) -> None:
    """Somebody tidied the cache up."""
    tiny_deb.write(tmp_path / "mirror/busybox-static_1_amd64.deb", [])
    with pytest.raises(HvHostError, match="no busybox; clear the cache and try again"):
        prepare_guest()


def test_a_32_bit_kernel_of_ones_own_gets_32_bit_programs(
    tmp_path: Path, packages_without_network: list[str]
) -> None:
    files = kernel_files() | {f"boot/vmlinuz-{RELEASE}": bzimage(bits=32)}
    package = tiny_deb.write(tmp_path / "linux-image-x_1_i386.deb", tiny_deb.files(files))
    images = prepare_guest(debs=[package])
    assert (images.architecture, images.daemons_of) == ("i386", "debian-12-pae")
    (tmp_path / "vmlinuz").write_bytes(bzimage(bits=32))
    assert prepare_guest(kernel=tmp_path / "vmlinuz").architecture == "i386"
    assert all(each.endswith(":i386") for each in packages_without_network)


def test_daemons_of_another_distribution(packages_without_network: list[str]) -> None:
    images = prepare_guest("debian-13", daemons="sid")
    assert images.title == "Debian 13, cloud kernel, daemons of Debian sid"
    assert images.daemons_of == "sid"
    asked = [each for each in packages_without_network if "hyperv-daemons" in each]
    assert asked == ["sid hyperv-daemons"]
    assert "trixie busybox-static" in packages_without_network
    assert prepare_guest("debian-13").daemons_of == "debian-13"
    with pytest.raises(HvHostError, match="There is no guest windows"):
        prepare_guest("debian-13", daemons="windows")


@pytest.mark.parametrize(
    ("release", "suite"),
    [
        ("6.9.12-x", "bookworm"),
        ("6.10.0-rc1", "sid"),
        ("6.12.9+deb13-cloud-amd64", "sid"),
        ("7.0", "sid"),
    ],
)
def test_the_daemons_go_with_a_kernel_of_ones_own(
    tmp_path: Path, packages_without_network: list[str], release: str, suite: str
) -> None:
    """From 6.10 on file copy is a driver in user space; its daemon brings the C library it wants.

    Of both there is one in a guest.
    """
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(bzimage(release))
    package = tiny_deb.write(
        tmp_path / "linux-image-x_1_amd64.deb", tiny_deb.files(kernel_files(release))
    )
    for is_file in (True, False):
        packages_without_network.clear()
        images = prepare_guest(kernel=kernel) if is_file else prepare_guest(debs=[package])
        assert images.daemons_of == {"bookworm": "debian-12", "sid": "sid"}[suite]
        for name in ("hyperv-daemons", "libc6"):
            asked = [each for each in packages_without_network if each.endswith(f" {name}")]
            assert asked == [f"{suite} {name}"]
        assert "bookworm busybox-static" in packages_without_network


def test_daemons_that_were_asked_for_stay(
    tmp_path: Path, packages_without_network: list[str]
) -> None:
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(bzimage("7.0"))
    assert prepare_guest(kernel=kernel, daemons="debian-11").daemons_of == "debian-11"
    assert "bullseye hyperv-daemons" in packages_without_network
    assert "bookworm libc6" in packages_without_network  # older daemons run with it
    kernel.write_bytes(bzimage("7.0", bits=32))
    prepare_guest(kernel=kernel)
    assert "bookworm hyperv-daemons:i386" in packages_without_network


def test_an_unknown_guest_lists_the_known_ones() -> None:
    with pytest.raises(HvHostError, match="debian-11, debian-11-generic, debian-12"):
        prepare_guest("windows")


def test_the_catalogue_has_cloud_and_full_kernels_of_every_suite() -> None:
    assert set(catalog.GUESTS) == {
        f"{name}{variant}"
        for name in ("debian-11", "debian-12", "debian-13", "sid")
        for variant in ("", "-generic")
    } | {"debian-12-python", "debian-12-pae"}
    assert catalog.recipe("debian-12").pae == catalog.recipe("debian-12-pae").name
    assert catalog.recipe("debian-13").pae is None
    assert catalog.recipe("sid-generic").kernel == "linux-image-amd64"
    assert catalog.recipe("debian-13").suite == "trixie"


def test_a_kernel_package_of_ones_own(tmp_path: Path) -> None:
    package = tiny_deb.write(tmp_path / "linux-image-x_1_amd64.deb", tiny_deb.files(kernel_files()))
    images = prepare_guest(debs=[package])
    assert images.release == RELEASE
    assert images.title == f"Linux {RELEASE}"


def test_a_kernel_spread_over_packages(tmp_path: Path) -> None:
    files = {
        (f"usr/{name}" if name.startswith("lib") else f"usr/lib/modules/{RELEASE}/vmlinuz"): data
        for name, data in kernel_files().items()
    }
    packages = [
        tiny_deb.write(tmp_path / f"part{index}_1_amd64.deb", tiny_deb.files({name: data}))
        for index, (name, data) in enumerate(files.items())
    ]
    images = prepare_guest(debs=packages)
    assert images.modules is not None
    assert images.modules.is_builtin("serio")
    assert images.modules.module("hv_vmbus") is not None


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"usr/bin/tool": b"x"}, "There is no kernel in"),
        ({f"boot/vmlinuz-{RELEASE}": bzimage()}, f"no modules of {RELEASE}"),
        ({f"boot/vmlinuz-{RELEASE}": b"x" * 2000}, "is not a Linux kernel"),
        (kernel_files() | kernel_files("6.2"), "several kernels"),
        ({**kernel_files(), f"boot/vmlinuz-{RELEASE}": bzimage("6.3")}, r"no modules of 6\.3"),
    ],
)
def test_packages_that_make_no_guest(
    tmp_path: Path, files: dict[str, bytes], complaint: str
) -> None:
    package = tiny_deb.write(tmp_path / "linux-image-x_1_amd64.deb", tiny_deb.files(files))
    with pytest.raises(HvHostError, match=complaint):
        prepare_guest(debs=[package])


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    for name, data in kernel_files().items():
        path = tmp_path / "unpacked" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "unpacked"


def test_a_kernel_file_with_its_modules(unpacked: Path) -> None:
    kernel = unpacked / f"boot/vmlinuz-{RELEASE}"
    for modules in (unpacked, unpacked / "lib/modules", unpacked / "lib/modules" / RELEASE):
        images = prepare_guest(kernel=kernel, modules=modules)
        assert images.modules is not None
        assert images.modules.release == RELEASE
    alone = prepare_guest(kernel=kernel)
    assert alone.modules is None
    assert alone.kernel == kernel


def test_modules_of_another_kernel_are_refused(unpacked: Path) -> None:
    kernel = unpacked / "boot/other"
    kernel.write_bytes(bzimage("6.9.0-other"))
    with pytest.raises(HvHostError, match=rf"are of {RELEASE}, the kernel is 6\.9\.0-other"):
        prepare_guest(kernel=kernel, modules=unpacked)


def test_the_release_of_an_uncompressed_kernel(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(b"\x7fELF" + b"Linux version %s\0Linux version 6.5.0-x (me@here) (gcc)\0")
    assert kernel_release(path) == "6.5.0-x"


@pytest.mark.parametrize("content", [b"", b"\x7fELF nothing", b"#!/bin/sh\n", bytes(0x300)])
def test_what_is_no_kernel_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(HvHostError, match="is not a Linux kernel"):
        prepare_guest(kernel=path)


@pytest.mark.parametrize("cut", [0x206, 0x20F, 0x210, 0x600])
def test_a_kernel_cut_short_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(bzimage()[:cut])
    with pytest.raises(HvHostError, match="is not a Linux kernel"):
        kernel_release(path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(HvHostError, match="cannot be read"):
        prepare_guest(kernel=tmp_path / "none")
    with pytest.raises(HvHostError, match="cannot be read"):
        prepare_guest(debs=[tmp_path / "none.deb"])


def test_contradicting_choices() -> None:
    with pytest.raises(HvHostError, match="only one of"):
        prepare_guest("debian-12", debs=[Path("x.deb")])
    with pytest.raises(HvHostError, match="belongs to --kernel"):
        prepare_guest(modules=Path("/lib/modules"))


def test_the_command_prints_kernel_and_initrd(capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main([]) == 0
    kernel, initrd = capsys.readouterr().out.splitlines()
    assert Path(kernel).is_file()
    assert Path(initrd).is_file()
    assert build.main(["windows"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_a_full_disk_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object, **_options: object) -> Path:
        raise OSError(28, "No space left on device", "/x")

    monkeypatch.setattr(build, "build_initramfs", full)
    with pytest.raises(HvHostError, match=r"\(/x: No space left on device\)"):
        prepare_guest()
