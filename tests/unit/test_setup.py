"""``scripts/setup`` on computers that are played: apt, sudo and Python are scripts that take notes.

What it asks of them is what a fresh computer, one without rights, and a second run are about.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUB = """#!/bin/bash
name=$(basename "$0")
echo "$name $*" >>"$NOTES"
case $name in
dpkg-query) [[ -e $NOTES.installed ]] && echo -n installed || exit 1 ;;
apt-get) [[ $* == *install* ]] && touch "$NOTES.installed"; exit 0 ;;
sudo)
    [[ $RIGHTS == sudo ]] || exit 1
    [[ $1 == -n ]] && shift
    exec "$@" ;;
*)
    case "$*" in
    "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip"*) [[ -z ${OFFLINE:-} ]] || exit 1 ;;
    -V) echo Python 3.99 ;;
    esac ;;
esac
"""


class Computer:
    """A directory with the script, and programs that only take notes.

    *rights* are ``root``, ``sudo`` or ``none``.
    """

    def __init__(self, directory: Path, rights: str) -> None:
        self.directory, self.rights = directory, rights
        (directory / "scripts").mkdir()
        (directory / "src").mkdir()
        for name in ("scripts/setup", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, directory / name)
        (directory / "bin").mkdir()
        for name in ("apt-get", "dpkg-query", "sudo", "python3"):
            (directory / "bin" / name).write_text(STUB)
            (directory / "bin" / name).chmod(0o755)
        self.notes = directory / "notes"

    def run(self, *words: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
        """With the notes begun anew."""
        self.notes.write_text("")
        mapped = ["--map-root-user"] if self.rights == "root" else []  # else its number is 65534
        environment = {
            "PATH": f"{self.directory / 'bin'}:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHON": "python3",  # ours, not the distribution's
            "NOTES": str(self.notes),
            "RIGHTS": self.rights,
            **({"OFFLINE": "yes"} if offline else {}),
        }
        return subprocess.run(
            ["unshare", "--user", *mapped, "--", *words],
            cwd=self.directory, env=environment,
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip

    def asked(self, *programs: str) -> list[str]:
        """What was asked of programs, by their names' ends."""
        lines = self.notes.read_text().splitlines()
        return [line for line in lines if line.split()[0].endswith(programs)]


@pytest.fixture
def computer(tmp_path: Path, request: pytest.FixtureRequest) -> Computer:
    try:
        subprocess.run(
            ["unshare", "--user", "--map-root-user", "true"], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this computer makes no user namespaces, in which one is root or is not")
    return Computer(tmp_path, getattr(request, "param", "root"))


@pytest.mark.parametrize("computer", ["root", "sudo"], indirect=True)
def test_a_second_run_downloads_nothing(computer: Computer) -> None:
    first = computer.run("scripts/setup", "dev")
    assert first.returncode == 0, first.stderr
    (update, install) = computer.asked("apt-get")
    assert "update" in update and "install --no-install-recommends -y" in install
    for package in ("qemu-system-x86", "gcc", "libc6-dev", "passt", "acpica-tools", "tshark"):
        assert f" {package}" in install
    (pip,) = (line for line in computer.asked("python") if " pip " in line)
    assert "-c constraints.txt -e .[dev]" in pip
    assert (computer.directory / ".venv/bin/python").exists()
    second = computer.run("scripts/setup", "dev")
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert not computer.asked("apt-get", "sudo")
    assert not [line for line in computer.asked("python") if " pip " in line or " venv " in line]


def test_what_is_asked_for_anew_is_installed_anew(computer: Computer) -> None:
    assert computer.run("scripts/setup").returncode == 0
    assert not any("[dev]" in line for line in computer.asked("python"))
    with (computer.directory / "constraints.txt").open("a") as file:
        file.write("# another\n")
    assert computer.run("scripts/setup").returncode == 0
    assert [line for line in computer.asked("python") if " pip " in line]


@pytest.mark.parametrize("computer", ["none"], indirect=True)
def test_without_rights_it_prints_the_line_to_run_and_stops(computer: Computer) -> None:
    stopped = computer.run("scripts/setup")
    assert stopped.returncode == 1
    assert "this user may not install them. Run this line, then start again:" in stopped.stderr
    assert not computer.asked("apt-get") and not (computer.directory / ".venv").exists()
    (line,) = stopped.stdout.splitlines()
    computer.rights = "sudo"  # a password that it could not type
    assert computer.run("sh", "-c", line).returncode == 0
    assert [words.split()[1] for words in computer.asked("apt-get")] == ["update", "install"]
    computer.rights = "none"
    assert computer.run("scripts/setup").returncode == 0, "it goes on where it stopped"
    assert not computer.asked("apt-get")


def test_without_a_network_it_says_so(computer: Computer) -> None:
    failed = computer.run("scripts/setup", offline=True)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].endswith("Is there a network?")
    assert computer.run("scripts/setup").returncode == 0, "what failed is not taken for done"
    assert [line for line in computer.asked("python") if " pip " in line]


def test_the_distributions_python_goes_before_another(computer: Computer) -> None:
    system = Path("/usr/bin/python3")
    needs = "import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))"
    if not system.exists() or subprocess.run([system, "-c", needs], check=False).returncode:
        pytest.skip(f"{system} is none that hvhost could use")
    computer.run("env", "-u", "PYTHON", "PIP_NO_INDEX=1", "scripts/setup")
    assert (computer.directory / ".venv/bin/python").resolve() == system.resolve()
    assert not computer.asked("python3")


def test_a_python_of_another_name_is_found(computer: Computer) -> None:
    programs = computer.directory / "bin"
    (programs / "python3").rename(programs / "python3.13")
    for older in ("python3", "python3.11", "python3.12"):
        (programs / older).write_text("#!/bin/bash\nexit 1\n")
        (programs / older).chmod(0o755)
    script = computer.directory / "scripts/setup"
    script.write_text(script.read_text().replace("/usr/bin/python3", "python3"))
    ran = computer.run("env", "-u", "PYTHON", "scripts/setup")
    assert ran.returncode == 0, ran.stderr
    assert computer.asked("python3.13")


def test_ci_makes_test_and_nothing_else(computer: Computer) -> None:
    (computer.directory / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", computer.directory / ".ci/run")
    make = computer.directory / "bin" / "make"
    make.write_text(STUB)
    make.chmod(0o755)
    done = computer.run(str(computer.directory / ".ci/run"))
    assert done.returncode == 0
    assert computer.notes.read_text() == "make test\n"
    assert os.access(ROOT / ".ci/run", os.X_OK)


def what_make_would_do(target: str, *words: str) -> list[str]:
    """The commands of a target, with those of the targets that it needs, in their order."""
    ours = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "GUEST"}  # of the make that runs these tests
    done = subprocess.run(
        ["make", "-n", target, *words],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env={name: value for name, value in os.environ.items() if name not in ours},
    )  # fmt: skip
    return [" ".join(line.split()) for line in done.stdout.replace("\\\n", " ").splitlines()]


def test_make_verify_sets_up_and_verifies_the_distributions_own_kernel() -> None:
    verify = ".venv/bin/hvhost verify --guest"
    assert what_make_would_do("verify") == ["scripts/setup", f"{verify} debian-12"]
    assert what_make_would_do("verify", "GUEST=sid")[-1] == f"{verify} sid"


def test_make_test_sets_up_and_runs_every_check_and_test() -> None:
    commands = what_make_would_do("test")
    assert commands[0] == "scripts/setup dev"
    programs = [" ".join(words.split()[:2]).removeprefix(".venv/bin/") for words in commands[1:]]
    assert programs == ["ruff check", "ruff format", "mypy", "pytest -m", "pytest -m"]
    assert [words.partition(" -n ")[0] for words in commands[-2:]] == [
        ".venv/bin/pytest -m 'not guest'",
        ".venv/bin/pytest -m guest --durations=10",
    ]


def test_make_test_matrix_has_every_kernel_of_the_contract() -> None:
    setup, matrix = what_make_would_do("test-matrix")
    assert setup == "scripts/setup dev"
    assert matrix.startswith("HVHOST_TEST_GUESTS=debian-12,debian-11,debian-13,sid ")
    assert ".venv/bin/pytest -m guest " in matrix
