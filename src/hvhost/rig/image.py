"""The rig's own kernel and initramfs: a distribution kernel, a few of its modules, the agent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Progress = Callable[[str], None]


def rig_image(progress: Progress) -> tuple[Path, Path]:
    """Paths of the kernel (uncompressed) and the initramfs; made once, then cached."""
    return Path("/tmp/rigimg/vmlinux"), Path("/tmp/rigimg/initrd")
