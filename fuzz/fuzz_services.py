"""Fuzz the integration services with atheris: ``python fuzz/fuzz_services.py [options]``.

The first byte chooses between all services, a file being copied, and snapshots.
"""

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
    from simulated.targets import fuzz_filecopy, fuzz_services, fuzz_vss

TARGETS = (fuzz_services, fuzz_filecopy, fuzz_vss)


def one_input(data: bytes) -> None:
    if data:
        TARGETS[data[0] % len(TARGETS)](data[1:])


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
