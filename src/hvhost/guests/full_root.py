"""What a complete guest has beyond its packages: the files hvhost puts into its root.

The rest of the system is the distribution's. The files are few: what tells systemd, udev and
chrony about Hyper-V, and the probe.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

SET_IFCONFIG = Path(__file__).with_name("hv_set_ifconfig.sh")
_PROBE = "usr/local/sbin/hvhost-probe"
_READY = "/run/hvhost-ready"


@dataclass(frozen=True, slots=True)
class RootFile:
    """A file of the guest, its path without leading slash; ``link`` makes it a symlink."""

    path: str
    content: bytes = b""
    mode: int = 0o644
    link: str | None = None


def _text(path: str, *lines: str, mode: int = 0o644) -> RootFile:
    return RootFile(path, "".join(f"{line}\n" for line in lines).encode(), mode)


def _service(name: str, *lines: str, by: str = "multi-user.target") -> tuple[RootFile, RootFile]:
    """A unit and the link that has it started with the unit *by*: with the system."""
    path = f"etc/systemd/system/{name}"
    wanted = f"etc/systemd/system/{by}.wants/{name}"
    return _text(path, *lines), RootFile(wanted, link=f"/{path}")


def initramfs_files() -> tuple[RootFile, ...]:
    """How the distribution's own initramfs is made; there before its kernel is installed."""
    return (
        # Whatever the computer that builds it has: drivers for all, and Hyper-V's in any case.
        _text("etc/initramfs-tools/conf.d/hyperv", "MODULES=most", "COMPRESS=lz4"),
        _text(
            "etc/initramfs-tools/hooks/hyperv",
            "#!/bin/sh",
            '[ "$1" != prereqs ] || exit 0',
            ". /usr/share/initramfs-tools/hook-functions",
            "manual_add_modules hv_vmbus hv_storvsc hv_utils sd_mod ext4 crc32c",
            mode=0o755,
        ),
        # kdump-tools wants the modules of the computer that builds it (dep); a crash kernel needs
        # those above and no others, and its memory is small.
        _text("etc/initramfs-tools/conf.d/zzzz-crash", '[ "$MODULES" != dep ] || MODULES=list'),
    )


def _crash_files() -> tuple[RootFile, ...]:
    """Crash dumps, where the kernel was started with memory for them (``crashkernel=``)."""
    return (
        _text(
            "etc/systemd/system/kdump-tools.service.d/crashkernel.conf",
            *("[Unit]", "ConditionKernelCommandLine=crashkernel"),
        ),
    )


def _network_files() -> tuple[RootFile, ...]:
    return (
        # After those that hv_set_ifconfig writes.
        _text(
            "etc/systemd/network/80-hyperv.network",
            *("[Match]", "Driver=hv_netvsc", "", "[Network]", "DHCP=yes"),
        ),
        # The servers themselves, not the local stub: hv_kvp_daemon tells the host what is in it.
        RootFile("etc/resolv.conf", link="/run/systemd/resolve/resolv.conf"),
        RootFile("usr/libexec/hypervkvpd/hv_set_ifconfig", SET_IFCONFIG.read_bytes(), mode=0o755),
        # Debian's unit takes every capability away, and makes /etc read-only.
        _text(
            "etc/systemd/system/hv-kvp-daemon.service.d/network.conf",
            "[Service]",
            "CapabilityBoundingSet=CAP_NET_ADMIN",
            "ReadWritePaths=/etc/systemd/network",
        ),
        # Nothing here needs a network to be up, and there may be none.
        RootFile("etc/systemd/system/systemd-networkd-wait-online.service", link="/dev/null"),
    )


def _ssh_files() -> tuple[RootFile, ...]:
    """A host key for each machine, made when somebody connects for the first time.

    Of one kind: emulated processors take long for the others.
    """
    key = "/etc/ssh/ssh_host_ed25519_key"
    return (
        _text("etc/ssh/sshd_config.d/hvhost.conf", f"HostKey {key}"),
        *_service(
            "hvhost-ssh-key.service",
            *("[Unit]", "Description=Make this machine's ssh host key", "Before=ssh.service"),
            *(f"ConditionPathExists=!{key}", ""),
            *("[Service]", "Type=oneshot", "RemainAfterExit=yes"),
            *(f"ExecStart=/usr/bin/ssh-keygen -q -t ed25519 -N '' -f {key}", ""),
            *("[Install]", "WantedBy=ssh.service"),
            by="ssh.service",
        ),
    )


def _time_files() -> tuple[RootFile, ...]:
    return (
        _text("etc/chrony/conf.d/hyperv.conf", "refclock PHC /dev/ptp_hyperv poll 3 dpoll -2"),
        _text(
            "etc/udev/rules.d/80-hyperv.rules",
            'SUBSYSTEM=="ptp", ATTR{clock_name}=="hyperv", TAG+="systemd"',
            'SUBSYSTEM=="memory", ACTION=="add", ATTR{state}=="offline", ATTR{state}="online"',
        ),
        # chronyd ends for good if its clock is not there yet.
        _text(
            "etc/systemd/system/chrony.service.d/hyperv.conf",
            *("[Unit]", "Wants=dev-ptp_hyperv.device", "After=dev-ptp_hyperv.device"),
        ),
    )


def _probe_files(probe: bytes) -> tuple[RootFile, ...]:
    serve = f"ExecStart=/{_PROBE}"
    return (
        RootFile(_PROBE, probe, 0o755),
        *_service(
            "hvhost-probe.service",
            *("[Unit]", "Description=hvhost's probe, over Hyper-V sockets", ""),
            *("[Service]", f"{serve} sockets", "Restart=always", ""),
            *("[Install]", "WantedBy=multi-user.target"),
        ),
        *_service(
            "hvhost-probe-serial.service",
            *("[Unit]", "Description=hvhost's probe, over the second serial port"),
            *("ConditionPathExists=/dev/ttyS1", ""),
            *("[Service]", f"{serve} /dev/ttyS1", "Restart=always", ""),
            *("[Install]", "WantedBy=multi-user.target"),
        ),
        *_service(
            "hvhost-ready.service",
            *("[Unit]", "Description=Tell hvhost that all has started"),
            *("After=multi-user.target", ""),
            *("[Service]", "Type=oneshot", f"ExecStart=/usr/bin/touch {_READY}", ""),
            *("[Install]", "WantedBy=multi-user.target"),
        ),
    )


def root_files(probe: bytes, root: UUID, sources: Iterable[str]) -> tuple[RootFile, ...]:
    """All files of ours. *root* names the root file system; *sources* are lines of apt's list."""
    return (
        *initramfs_files(),
        _text("etc/fstab", f"UUID={root} / ext4 errors=remount-ro 0 1"),
        _text("etc/hostname", "hvhost-guest"),
        _text("etc/hosts", "127.0.0.1 localhost", "::1 localhost", "127.0.1.1 hvhost-guest"),
        _text("etc/apt/sources.list", *sources),
        # On a busy computer emulated processors can take longer than systemd's 90 s for a device.
        _text(
            "etc/systemd/system.conf.d/hvhost.conf",
            *("[Manager]", "DefaultDeviceTimeoutSec=15min", "DefaultTimeoutStartSec=15min"),
        ),
        # No guest of ours asks the network for anything by itself.
        *(
            RootFile(f"etc/systemd/system/{timer}.timer", link="/dev/null")
            for timer in ("apt-daily", "apt-daily-upgrade")
        ),
        *_crash_files(),
        *_network_files(),
        *_ssh_files(),
        *_time_files(),
        *_probe_files(probe),
    )


def archive(files: Iterable[RootFile], seconds: int) -> bytes:
    """The files as a tar, all root's, of one time: the same bytes for the same files.

    Directories are not in it, so that those of the system keep their modes.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for file in sorted(files, key=lambda each: each.path):
            member = tarfile.TarInfo(f"./{file.path}")
            member.mtime, member.mode, member.uname, member.gname = seconds, file.mode, "", ""
            if file.link is not None:
                member.type, member.linkname, member.mode = tarfile.SYMTYPE, file.link, 0o777
            else:
                member.size = len(file.content)
            tar.addfile(member, io.BytesIO(file.content))
    return buffer.getvalue()
