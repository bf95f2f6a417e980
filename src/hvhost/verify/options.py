"""What ``hvhost verify`` is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hvhost.machine.model import Transport


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """One verification; memory in bytes.

    The kernel is *guest* (a known distribution), *kernel* with *modules*, or *debs*; none of them
    means the default distribution. Empty *rows* means the whole contract.
    *daemons* names a distribution whose Hyper-V daemons are taken instead of the guest's own.
    *append* is put at the end of the guest's command line.
    """

    guest: str | None = None
    kernel: Path | None = None
    modules: Path | None = None
    debs: list[Path] = field(default_factory=list)
    daemons: str | None = None
    rows: list[str] = field(default_factory=list)
    cpus: int = 2
    memory: int = 512 << 20
    json_path: Path | None = None
    svg_path: Path | None = None
    keep_logs: Path | None = None
    allow_lacks: list[str] = field(default_factory=list)
    baseline: Path | None = None
    transport: Transport = Transport.AUTO
    append: str = ""
