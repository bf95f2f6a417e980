"""Marks for what costs too much to always run: ``make test-matrix`` sets what they look at."""

from __future__ import annotations

import os

import pytest

#: Complete guests to test, built from packages.
FULL = [name for name in os.environ.get("HVHOST_TEST_FULL", "").split(",") if name]

needs_full = pytest.mark.skipif(
    not FULL, reason="takes minutes; HVHOST_TEST_FULL=debian-12-full (make test-matrix) runs it"
)


def only_in_matrix(why: str) -> pytest.MarkDecorator:
    """Skipped unless guests are named; *why*, in a few words, is what it costs."""
    return pytest.mark.skipif(
        "HVHOST_TEST_GUESTS" not in os.environ, reason=f"{why}; `make test-matrix` runs it"
    )
