"""A bench module run inside a software KVM host, where ``/dev/kvm`` is local."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from hvhost.errors import HvHostError


def figures(module: str, *arguments: str) -> Any:
    """What *module* printed as JSON in its last line; :class:`HvHostError` if it did not."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "hvhost", "rig", "exec", "--"),
            *(sys.executable, "-m", module, *arguments),
        ],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise HvHostError(
            f"the software KVM host ended with status {done.returncode} and no figures."
        ) from None
