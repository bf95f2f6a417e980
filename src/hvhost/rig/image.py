"""The rig's own kernels and initramfs archives: distribution packages and a program of ours."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvhost.compiler import build_static
from hvhost.errors import HvHostError
from hvhost.firmware.extract import cached_vmlinux
from hvhost.firmware.image import open_kernel
from hvhost.guests import apt, cpio, deb
from hvhost.guests.modules import ModuleTree, find_tree, read_module
from hvhost.paths import cache_dir, write_whole
from hvhost.rig import layout

log = logging.getLogger(__name__)

Progress = Callable[[str], None]

SUITES = ("bookworm-backports", "bookworm")
"""Suites to take a kernel from, best first: from 6.3 on KVM forwards extended hypercalls."""

AGENT_MODULES = {
    "kvm_amd": "npt=1",
    "vfio_iommu_type1": "allow_unsafe_interrupts=1",
    "vfio_pci": "ids=1af4:1110",
}

# `or $0x1e6, %r64` in load_pdptrs(): the reserved bits of an entry of the top table of PAE paging.
_PDPT_RESERVED = re.compile(rb"(?:\x48\x0d|[\x48\x49]\x81[\xc8-\xcf])\xe6\x01\x00\x00")
_PDPT_ACCESSED = 1 << 5
_SIGNATURE_MARK, _SIGNATURE_SIZE = b"~Module signature appended~\n", 12


@dataclass(frozen=True, slots=True)
class RigKernel:
    """A kernel to run in the rig: *kernel* is uncompressed."""

    kernel: Path
    modules: ModuleTree


def rig_kernel(package: str, progress: Progress) -> RigKernel:
    """The newest kernel *package* that the distribution and its backports offer."""
    failure = None
    for suite in SUITES:
        try:
            files = deb.extract(apt.download(suite, [package], progress=progress), progress)
        except HvHostError as error:
            failure = failure or error
            progress(f"{suite} has no {package} for the rig: {error}")
            continue
        images = sorted((files / "boot").glob("vmlinuz-*"))
        if images:
            kernel = cached_vmlinux(images[-1], open_kernel(images[-1]))
            return RigKernel(kernel, ModuleTree(find_tree(files)))
    raise failure or HvHostError(f"package {package} holds no kernel for the rig.")


def build_archive(name: str, entries: Sequence[cpio.Entry]) -> Path:
    """An initramfs of *entries*, cached by content."""
    content = cpio.archive(list(entries))
    path = cache_dir("rig") / f"{name}-{hashlib.sha256(content).hexdigest()[:16]}.cpio"
    if not path.exists():
        write_whole(path, content)
    return path


def bear_accessed_pdpt(kvm: bytes) -> bytes:
    """KVM's module such that it takes the accessed bit in top table entries of a 32-bit guest.

    QEMU's emulated processors set it (``mmu_translate()`` in ``target/i386/tcg``), real ones do
    not and reserve it ([AMD64] volume 2, 5.2.3). KVM looks whenever a guest changes CR0 or CR4,
    and faults a guest whose own processor, as it seems, broke its table. The module as it is where
    that place is not found: 32-bit guests do not start on such a rig then.
    """
    places = list(_PDPT_RESERVED.finditer(kvm))
    if len(places) != 1:
        log.warning("32-bit guests will not start here: the rig's KVM is an unknown one")
        return kvm
    content, place = bytearray(kvm), places[0].end() - 4
    content[place] &= ~_PDPT_ACCESSED
    return bytes(content)


def without_signature(module: bytes) -> bytes:
    """A module without the signature behind it: Linux takes none before it takes a wrong one.

    Source: ``struct module_signature`` in ``linux/module_signature.h``; its last field is the
    length of what lies before it.
    """
    if not module.endswith(_SIGNATURE_MARK):
        return module
    end = len(module) - len(_SIGNATURE_MARK) - _SIGNATURE_SIZE
    return module[: end - int.from_bytes(module[end + 8 : end + 12], "big")]


def module_entries(tree: ModuleTree, parameters: dict[str, str]) -> list[cpio.Entry]:
    """Modules, decompressed, and ``/modules``: their files and parameters in load order.

    They go without their signatures, which take an emulated processor long to verify.
    """
    entries, lines = [], []
    for module in tree.closure(parameters):
        path = f"{module.name}.ko"
        content = without_signature(read_module(tree.root / module.path))
        if module.name == "kvm":
            content = bear_accessed_pdpt(content)
        entries.append(cpio.file(path, content))
        lines.append(f"/{path} {parameters.get(module.name, '')}".rstrip())
    entries.append(cpio.file("modules", ("\n".join(lines) + "\n").encode()))
    return entries


def build_agent() -> Path:
    """The agent as a static program."""
    return build_static(layout.AGENT, [layout.HEADER], ["-pthread"])


def rig_image(progress: Progress) -> tuple[Path, Path]:
    """Paths of the shared rig's kernel (uncompressed) and initramfs; made once, then cached."""
    kernel = rig_kernel("linux-image-cloud-amd64", progress)
    entries = [
        cpio.directory("dev"),
        cpio.character_device("dev/console", 5, 1),
        cpio.file("init", build_agent().read_bytes(), 0o755),
        *module_entries(kernel.modules, AGENT_MODULES),
    ]
    return kernel.kernel, build_archive("agent", entries)
