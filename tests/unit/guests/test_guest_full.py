"""How a complete guest is made: the recipe and the files of ours. Nothing is downloaded."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from uuid import UUID

import pytest

from hvhost.errors import HvHostError
from hvhost.guests import apt, build, catalog, full, full_root
from hvhost.manager import definition
from hvhost.units import MIB

ROOT = UUID(int=7)
SOURCES = [apt.Source("http://mirror/debian", ("trixie", "trixie-updates"), signed_by="/keys.gpg")]


def files() -> dict[str, full_root.RootFile]:
    made = full_root.root_files(b"probe", ROOT, full.source_lines(SOURCES, signed=False))
    return {file.path: file for file in made}


def test_the_archive_is_the_same_each_time_and_all_roots() -> None:
    content = full_root.archive(files().values(), 1000)
    assert content == full_root.archive(reversed(files().values()), 1000)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = {member.name: member for member in tar}
    assert {(m.uid, m.gid, m.mtime) for m in members.values()} == {(0, 0, 1000)}
    assert members["./usr/local/sbin/hvhost-probe"].mode == 0o755
    assert members["./etc/fstab"].size == len(f"UUID={ROOT} / ext4 errors=remount-ro 0 1\n")
    assert not any(member.isdir() for member in members.values()), "the system has them already"


def test_no_path_is_given_twice_and_links_to_units_lead_to_units() -> None:
    made = full_root.root_files(b"", ROOT, ())
    paths = [file.path for file in made]
    assert len(paths) == len(set(paths))
    wanted = [file for file in made if ".wants/" in file.path]
    assert wanted
    assert all(file.link is not None and file.link.lstrip("/") in paths for file in wanted)


def test_keys_of_this_computer_are_not_named_in_the_guest() -> None:
    assert files()["etc/apt/sources.list"].content.decode().splitlines() == [
        "deb http://mirror/debian trixie main",
        "deb http://mirror/debian trixie-updates main",
    ]
    assert full.source_lines(SOURCES, signed=True)[0] == (
        "deb [signed-by=/keys.gpg] http://mirror/debian trixie main"
    )


def test_the_command_installs_the_recipe_with_the_systems_proxy() -> None:
    recipe = catalog.full_recipe("debian-13-full")
    settings = ['Acquire::http::Proxy "http://proxy";']
    words = full.install_command(recipe, "unshare", Path("/e.tar"), SOURCES, settings)
    assert "--mode=unshare" in words
    assert '--aptopt=Acquire::http::Proxy "http://proxy"' in words
    assert words.index("trixie") < words.index("-")
    (included,) = (word for word in words if word.startswith("--include="))
    assert {"systemd-sysv", "hyperv-daemons"} <= set(included.split("=")[1].split(","))


def test_each_machine_makes_its_own_host_key() -> None:
    """None is built in, which all would share, and none is made before somebody connects."""
    made = files()
    unit = made["etc/systemd/system/hvhost-ssh-key.service"].content.decode().splitlines()
    (setting,) = made["etc/ssh/sshd_config.d/hvhost.conf"].content.decode().splitlines()
    key = setting.removeprefix("HostKey ")
    assert f"ConditionPathExists=!{key}" in unit and "Before=ssh.service" in unit
    assert any(line.startswith("ExecStart=") and line.endswith(f" -f {key}") for line in unit)
    assert "etc/systemd/system/ssh.service.wants/hvhost-ssh-key.service" in made
    recipe = catalog.full_recipe("debian-12-full")
    words = full.install_command(recipe, "root", Path("/e.tar"), SOURCES, [])
    (hook,) = (word for word in words if "ssh_host_" in word)
    steps = hook.splitlines()
    assert "rm -f /etc/ssh/ssh_host_*" in steps
    assert "systemctl --quiet disable ssh.service" in steps
    assert "systemctl --quiet enable ssh.socket" in steps


def test_who_cannot_build_is_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full, "_find_program", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert full.installation_mode() == "root"
    monkeypatch.setattr(os, "geteuid", lambda: 1)  # daemon
    monkeypatch.setattr(full, "_SUBORDINATES", (tmp_path / "subuid",))
    with pytest.raises(HvHostError, match="add-subuids"):
        full.installation_mode()
    (tmp_path / "subuid").write_text("daemon:100000:65536\n")
    assert full.installation_mode() == "unshare"
    monkeypatch.setattr(
        full, "_find_program", lambda name: None if name == "newuidmap" else f"/usr/bin/{name}"
    )
    with pytest.raises(HvHostError, match="apt-get install uidmap"):
        full.installation_mode()
    monkeypatch.setattr(full, "_find_program", lambda name: None)
    with pytest.raises(HvHostError, match="apt-get install mmdebstrap"):
        full.installation_mode()


def test_a_failed_step_says_its_first_error() -> None:
    with pytest.raises(HvHostError, match=r"sh could not build the guest \(none\)"):
        full._run(
            ["sh", "-c", "for each in none bye; do echo E: $each >&2; done; exit 1"],
            None,
            apt.silent,
        )


def test_a_system_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    def make(recipe: catalog.FullRecipe, *rest: object) -> None:
        target = rest[3]
        assert isinstance(target, Path)
        built.append(recipe.suite)
        (target / "packages").write_text("bash 5.2\nlinux-image 6.1-1\n")

    probe = tmp_path / "probe"
    probe.write_bytes(b"probe")
    monkeypatch.setattr(full, "build_probe", lambda: probe)
    monkeypatch.setattr(full, "installation_mode", lambda: "root")
    monkeypatch.setattr(full, "_build", make)
    guest = full.prepare_full("debian-12-full")
    assert full.prepare_full("debian-12-full") == guest
    assert built == ["bookworm"]
    assert full.packages_of(guest) == {"bash": "5.2", "linux-image": "6.1-1"}
    full.prepare_full("debian-12-full", refresh=True)
    assert built == ["bookworm", "bookworm"]
    probe.write_bytes(b"another")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4095 * MIB))
    with pytest.raises(HvHostError, match=r"4095 MiB free in .*takes up to 4096; make room"):
        full.prepare_full("debian-12-full")
    assert built == ["bookworm", "bookworm"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4096 * MIB))
    assert full.prepare_full("debian-12-full").disk != guest.disk
    config = definition.define_guest("debian-12-full", command_line="debug")
    assert config.command_line.split()[:2] == ["console=ttyS0", f"root=UUID={guest.root}"]
    assert config.command_line.endswith(" debug")
    assert [drive.temporary for drive in config.drives] == [True]


def test_names_of_complete_guests() -> None:
    assert set(catalog.FULL_GUESTS) == {"debian-12-full", "debian-13-full", "sid-full"}
    with pytest.raises(HvHostError, match="choose one of debian-12-full"):
        full.prepare_full("debian-11-full")
    with pytest.raises(HvHostError, match="complete system"):
        build.prepare_guest("debian-12-full")


STATIC = """HWADDR=00:15:5D:00:00:01
DEVICE=eth0
BOOTPROTO=none
IPADDR0=10.0.0.2
IPADDR1=10.1.0.2
IPV6ADDR=fd00::2
NETMASK0=255.255.255.0
NETMASK1=255.254.0.0
IPV6NETMASK=63
GATEWAY=10.0.0.1
IPV6_DEFAULTGW=fd00::1
DNS1=10.0.0.53
"""


def configured(tmp_path: Path, wish: str) -> tuple[list[str], list[str]]:
    """What the script writes for systemd-networkd, and what it asks networkctl."""
    tool = tmp_path / "networkctl"
    tool.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\n')
    tool.chmod(0o755)
    (tmp_path / "ifcfg-eth0").write_text(wish)
    subprocess.run(
        ["sh", str(full_root.SET_IFCONFIG), str(tmp_path / "ifcfg-eth0")],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "HVHOST_NETWORK_DIRECTORY": str(tmp_path)},
        check=True,
    )
    written = (tmp_path / "10-hyperv-eth0.network").read_text().splitlines()
    return written, (tmp_path / "asked").read_text().splitlines()


@pytest.mark.parametrize("mask", ["63", "ffff:ffff:ffff:fffe::"])
def test_static_addresses_of_both_families(tmp_path: Path, mask: str) -> None:
    written, asked = configured(tmp_path, STATIC.replace("=63", f"={mask}"))
    assert written == [
        *("[Match]", "Name=eth0", "", "[Network]", "DHCP=no", "IPv6AcceptRA=no"),
        *("Address=10.0.0.2/24", "Address=10.1.0.2/15", "Address=fd00::2/63"),
        *("Gateway=10.0.0.1", "Gateway=fd00::1", "DNS=10.0.0.53"),
    ]
    assert asked == ["reload", "reconfigure eth0"]


@pytest.mark.parametrize(
    ("more", "dhcp"), [("", "DHCP=yes"), ("IPV6ADDR=fd00::2\nIPV6NETMASK=64\n", "DHCP=ipv4")]
)
def test_dhcp_again(tmp_path: Path, more: str, dhcp: str) -> None:
    written, _ = configured(tmp_path, f"DEVICE=eth0\nBOOTPROTO=dhcp\n{more}")
    assert dhcp in written
    assert ("Address=fd00::2/64" in written) is bool(more)
