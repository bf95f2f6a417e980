"""Shell scripts in the guest, for rows: what they print, or the row fails with what they said."""

from __future__ import annotations

from hvhost.verify.guest import Probe, RowFailed


def run(probe: Probe, script: str, timeout: float = 60.0) -> str:
    """A shell script's output in the guest; :class:`RowFailed` with its last lines if it fails."""
    result = probe.run(["sh", "-c", script], timeout)
    if result.status != 0:
        lines = result.output.strip().splitlines()[-6:]
        said = f": {lines[-1][-200:]}" if lines else ""
        raise RowFailed(f"in the guest, {script[:70]!r} failed{said}", lines)
    return result.output.strip()
