"""What holds for all tests."""

from __future__ import annotations

import signal

from hypothesis import settings

# A shell's background job ignores it, and so would all that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy computer is no failure: no test is timed, property tests neither.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
