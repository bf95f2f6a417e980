"""How a command says what takes time."""

from __future__ import annotations

import sys


def say(message: str) -> None:
    """One line on standard error."""
    print(f"hvhost: {message}…", file=sys.stderr)
