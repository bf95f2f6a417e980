"""The Python in docs/run.md, run with a worker that has no virtual machine."""

from __future__ import annotations

import ast
import asyncio
import re
import types
from pathlib import Path
from typing import Any

import pytest

from hvhost import Machine
from hvhost.machine.model import MachineConfig
from hvhost.manager import machine as module
from hvhost.manager.control import machines
from hvhost.manager.definition import define

PAGE = (Path(__file__).parents[3] / "docs" / "run.md").read_text()
PROGRAM, PYTEST = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
(NOTEBOOK,) = re.findall(r"^```py\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def _guest(runtime: Path, config: MachineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the place of the distribution's kernel, and no probe in it."""

    def define_guest(guest: str, **settings: Any) -> MachineConfig:
        assert guest == "debian-12"
        settings.pop("progress", None)
        return define(kernel=config.kernel, **settings)

    async def execute(machine: Machine, arguments: list[str]) -> types.SimpleNamespace:
        return types.SimpleNamespace(text=f"{' '.join(arguments)} of {machine.name}")

    monkeypatch.setattr(module, "define_guest", define_guest)
    monkeypatch.setattr(Machine, "execute", execute)


def test_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(PROGRAM, "run.md", "exec"), {"__name__": "__main__"})
    assert re.search(r"^bus .*\nuname -r of ", capsys.readouterr().out)
    assert not machines()


def test_the_cells_of_a_notebook() -> None:
    seen: list[object] = []

    async def notebook() -> None:
        cells: dict[str, Any] = {}
        for node in ast.parse(NOTEBOOK).body:
            if isinstance(node, ast.Expr):  # whose value a notebook shows
                tree: ast.AST = ast.Expression(node.value)
            else:
                tree = ast.Module([node], [])
            mode = "eval" if isinstance(node, ast.Expr) else "exec"
            code = compile(tree, "cell", mode, ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)  # type: ignore[call-overload]
            result = eval(code, cells)
            seen.append(await result if asyncio.iscoroutine(result) else result)
        assert repr(cells["machine"]) == f"<hvhost.Machine {cells['machine'].name!r}>"

    asyncio.run(notebook())
    assert [0.001] * 10 in seen
    assert not machines()


def test_the_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("bzImage", "initrd.img"):
        Path(name).write_bytes(b"MZ")
    example = tmp_path / "test_of_the_page.py"
    # That worker has other words for it.
    example.write_text(PYTEST.replace("the guest powered off", "power-off"))
    words = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(tmp_path)]
    assert pytest.main([*words, str(example)]) == pytest.ExitCode.OK
    assert not machines()
