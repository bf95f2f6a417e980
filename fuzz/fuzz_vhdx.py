"""Fuzz disk images, VHDX and VHD, with atheris: ``python fuzz/fuzz_vhdx.py [options]``."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

try:
    import atheris
except ImportError:
    sys.exit("atheris is not installed; install it with: pip install 'hvhost[fuzz]'")

with atheris.instrument_imports(include=["hvhost"]):
    from simulated.disk_targets import fuzz_vhd, fuzz_vhdx


def fuzz_one(data: bytes) -> None:
    """The first byte chooses the format."""
    (fuzz_vhd if data[:1] > b"\x7f" else fuzz_vhdx)(data[1:])


if __name__ == "__main__":
    atheris.Setup(sys.argv, fuzz_one)
    atheris.Fuzz()
