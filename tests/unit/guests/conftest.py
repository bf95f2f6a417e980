"""Each test has a cache of its own, so that none depends on what was downloaded before."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv("HVHOST_CACHE_DIR", str(cache))
    monkeypatch.delenv("HVHOST_DEBIAN_MIRROR", raising=False)
    return cache
