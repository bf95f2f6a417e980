"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# A busy computer is no failure: no test is timed, property tests neither.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
