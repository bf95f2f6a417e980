"""Protocol modules do no I/O: neither they nor what they import of ours can."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[2] / "src"
PROTOCOLS = sorted(SOURCES.rglob("*protocol.py"))
IO = {
    *("asyncio", "fcntl", "http", "httpx", "io", "os", "pathlib", "select", "selectors"),
    *("shutil", "signal", "socket", "subprocess", "tempfile"),
}
#: What a ring may need for the order of its accesses, and messages never.
NOT_FOR_MESSAGES = {"mmap", "threading", "time"}
ROOMS_WITH_IO = ("kvm", "rig", "manager", "cli", "verify")


def imports(source: str) -> set[str]:
    """Modules that *source* imports when it runs: not those for type checkers alone."""
    found: set[str] = set()

    def look(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module)
        for child in ast.iter_child_nodes(node):
            look(child)

    look(ast.parse(source))
    return found


def file_of(module: str) -> Path | None:
    path = SOURCES.joinpath(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()), None)


@pytest.mark.parametrize("path", PROTOCOLS, ids=lambda path: str(path.relative_to(SOURCES)))
def test_a_protocol_does_no_io(path: Path) -> None:
    own = {each.partition(".")[0] for each in imports(path.read_text())}
    assert not own & NOT_FOR_MESSAGES
    todo, seen = [path], {path}
    while todo:
        file = todo.pop()
        source = file.read_text()
        named = imports(source)
        assert not {each.partition(".")[0] for each in named} & IO, file
        rooms = {each.split(".")[1] for each in named if each.startswith("hvhost.")}
        assert not rooms & set(ROOMS_WITH_IO), file
        calls = {
            ast.unparse(n.func) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)
        }
        assert not calls & {"open", "print", "input"}, file
        for module in named:
            if module.startswith("hvhost.") and (more := file_of(module)) and more not in seen:
                seen.add(more)
                todo.append(more)


def test_imports_are_found_but_those_for_types() -> None:
    source = "if TYPE_CHECKING:\n    import os\ndef late():\n    from socket import x\nimport a.b\n"
    assert imports(source) == {"socket", "a.b"}
    assert len(PROTOCOLS) > 8
