"""No protocol module is forgotten by the fuzzers."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "src"
PROTOCOLS = [
    ".".join(path.relative_to(SOURCES).with_suffix("").parts)
    for path in sorted(SOURCES.rglob("*protocol.py"))
]


def targets() -> dict[str, str]:
    """Modules of targets and the functions that ``fuzz/`` names, by the fuzzer's file."""
    found = {}
    for path in sorted((ROOT / "fuzz").glob("fuzz_*.py")):
        call = re.search(r'fuzz\("([\w.]+)", (.*)\)', path.read_text())
        assert call is not None, path.name
        module = importlib.import_module(call[1])
        for name in re.findall(r'"(\w+)"', call[2]):
            assert callable(getattr(module, name)), f"{path.name}: {name}"
        found[path.name] = call[1]
    return found


def modules_used(module: str) -> set[str]:
    """Where the functions and classes come from that a module names."""
    return {str(getattr(each, "__module__", "")) for each in vars(sys.modules[module]).values()}


def test_protocols_are_found() -> None:
    assert {"hvhost.vmbus.protocol", "hvhost.guests.probe_protocol"} <= set(PROTOCOLS)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_protocol_is_fuzzed(protocol: str) -> None:
    """A target uses it, or what a target uses in its folder does."""
    roots = ("simulated.", protocol.rpartition(".")[0] + ".")
    used, looked_at = set(targets().values()), set[str]()
    while more := {each for each in used - looked_at if each.startswith(roots)}:
        looked_at |= more
        used |= {each for module in more for each in modules_used(module)}
    assert protocol in used, f"no target in fuzz/ reaches {protocol}"


def test_every_target_is_run_as_a_property_too() -> None:
    """So that each is tried on every computer, and not only where atheris runs."""
    texts = [path.read_text() for path in (ROOT / "tests/unit").rglob("test_*.py")]
    properties = "\n".join(text for text in texts if "@given(" in text)
    named = {
        name
        for path in (ROOT / "fuzz").glob("fuzz_*.py")
        for name in re.findall(r'"(fuzz_\w+)"', path.read_text())
    }
    assert len(named) > 10
    assert not {name for name in named if not re.search(rf"\b{name}\(", properties)}
