"""The plain `hvhost run`: it means what the whole command line means, and costs less."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from hvhost.cli import plain
from hvhost.cli.app import app

GROUP: Any = typer.main.get_command(app)
RUN = GROUP.commands["run"]
NAMES = {"append": "command_line", "kvm": "transport"}
WORDS = [
    *plain._OPTIONS,
    *(option for each in RUN.params for option in each.opts),
    *("--kernel=k", "--cpus=3", "--name=", "--memory=1G", "--kvm=rig", "--kvm=none", "--append=-v"),
    *("k", "2", "-1", "0x2", "٣", "local", "LOCAL", "512M", "", "-x", "--", "--help", "--ker"),
]


def whole(arguments: list[str]) -> dict[str, Any] | None:
    """What the whole command line understands; options that were given, by `define`'s names."""
    try:
        context = RUN.make_context("run", list(arguments))
    except Exception:  # the library's own kinds, which it does not export
        return None
    given = {}
    for parameter in RUN.params:
        if context.get_parameter_source(parameter.name).name == "COMMANDLINE":
            value = context.params[parameter.name]
            name = NAMES.get(parameter.name, parameter.name)
            given[name] = str(value) if isinstance(value, Path) else value
    return given


@given(st.lists(st.sampled_from(WORDS), max_size=7))
def test_what_is_understood_means_the_same(arguments: list[str]) -> None:
    options = plain.parse(arguments)
    if options is not None:
        assert whole(arguments) == {
            name: str(Path(str(value))) if name in ("kernel", "initrd") else value
            for name, value in options.items()
        }


def test_the_plainest_are_understood() -> None:
    arguments = ["--kernel", "k", "--initrd=i", "--append", "a b", "--name", "n", "--cpus", "2"]
    assert plain.parse([*arguments, "--memory", "1G", "--kvm", "local"]) == {
        "kernel": "k",
        "initrd": "i",
        "command_line": "a b",
        "name": "n",
        "cpus": 2,
        "memory": "1G",
        "transport": "local",
    }


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["--kernel"],
        ["--kernel", "k", "--detach"],
        ["--kernel", "k", "--nic", "nat"],
        ["--kernel", "k", "--cpus", "two"],
        ["--kernel", "k", "--kvm", "none"],
        ["--kernel", "k", "--kernel", "l"],
        ["--kernel", "k", "--append", "--x"],
        ["--kernel", "k", "more"],
        ["--guest", "debian-12"],
    ],
)
def test_the_rest_is_left_to_the_whole(arguments: list[str]) -> None:
    assert plain.parse(arguments) is None
    assert not plain.run(["run", *arguments])


def test_other_commands_are_not_ours() -> None:
    assert not plain.run([])
    assert not plain.run(["doctor"])
    assert not plain.run(["verify", "--kernel", "k"]), "which `run` would understand"


def test_the_version_alone_imports_no_library() -> None:
    code = (
        "import sys; from hvhost.cli.main import main\n"
        "main(); print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--version"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    said, modules = done.stdout.splitlines()
    assert said.startswith("hvhost ")
    assert not {"typer", "click", "rich", "msgspec", "asyncio"} & set(modules.split())


def test_a_plain_run_imports_no_library_of_ours(tmp_path: Path) -> None:
    """Also with an error at its end, whose sentence is the same as ever."""
    code = (
        "import sys; from hvhost.cli.main import main\n"
        "try: main()\n"
        "finally: print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "--kernel", "/nowhere/vmlinuz", "--memory", "1G"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HVHOST_RUNTIME_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "hvhost: there is no kernel '/nowhere/vmlinuz'; check the path.\n"
    heavy = {"typer", "click", "rich", "msgspec", "httpx", "uvicorn", "starlette", "anyio"}
    assert not heavy & set(done.stdout.split())
    assert not {"asyncio", "subprocess", "socket", "json"} & set(done.stdout.split())
