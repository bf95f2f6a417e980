"""Fuzz the storage controller with atheris: ``python fuzz/fuzz_storage.py [options]``."""

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
    from simulated.storage_targets import fuzz_storage

if __name__ == "__main__":
    atheris.Setup(sys.argv, fuzz_storage)
    atheris.Fuzz()
