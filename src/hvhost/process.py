"""What a process of hvhost does as it begins: it says where to, and with whom it ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with(parent: int, number: int = signal.SIGTERM) -> Callable[[], None]:
    """For a child that was just forked: be sent signal *number* when *parent* is gone."""
    import ctypes

    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def bind() -> None:
        prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return bind


def log_to_stderr() -> None:
    """Log lines go to standard error, which whoever started the process keeps."""
    import logging
    import sys

    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s: %(message)s"
    )
