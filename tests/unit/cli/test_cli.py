from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hvhost import version as version_module
from hvhost.cli.app import app
from hvhost.cli.main import main
from hvhost.errors import HvHostError
from hvhost.guests.catalog import FULL_GUESTS, GUESTS
from hvhost.machine.model import MachineConfig, Transport
from hvhost.manager import definition, foreground
from hvhost.manager import doctor as doctor_module
from hvhost.manager.client import MachineClient
from hvhost.manager.directory import MachineDirectory, NameState
from hvhost.manager.doctor import Check, CheckStatus, Diagnosis
from hvhost.manager.launcher import launch
from hvhost.verify import command as verify_command
from hvhost.verify.options import VerifyOptions

COMMANDS = [
    [],
    ["verify"],
    ["run"],
    ["ps"],
    ["info"],
    ["console"],
    ["stop"],
    ["restart"],
    ["nmi"],
    ["pause"],
    ["resume"],
    ["rm"],
    ["time"],
    ["kvp"],
    ["exec"],
    ["copy"],
    ["services"],
    ["doctor"],
    ["rig"],
    ["rig", "status"],
    ["rig", "exec"],
    ["version"],
]


class Result:
    """What a command left: its exit status and what it printed."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


class Hvhost:
    """``hvhost`` in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch = monkeypatch
        self.capsys = capsys

    def __call__(self, *arguments: str) -> Result:
        self.monkeypatch.setattr(sys, "argv", ["hvhost", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = self.capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Result(ended.value.code, printed.out, printed.err)

    def sentence(self, *arguments: str) -> str:
        """The one line a failed command leaves on standard error."""
        result = self(*arguments)
        assert result.status == 1
        assert result.out == ""
        assert result.err.startswith("hvhost: ")
        assert result.err.count("\n") == 1
        return result.err.removeprefix("hvhost: ").rstrip("\n")


@pytest.fixture
def hvhost(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Hvhost:
    return Hvhost(monkeypatch, capsys)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["hvhost", *{words!r}, "--help"]
from hvhost.cli.main import main
try:
    main()
except SystemExit as ended:
    assert ended.code == 0
heavy = {{"asyncio", "httpx", "starlette", "uvicorn", "msgspec", "http.client", "rich",
          "zstandard", "lz4"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
ours = {{name for name in sys.modules if name.startswith("hvhost.")}}
ours -= {{name for name in ours if name.startswith("hvhost.cli")}}
plain = {{"errors", "machine", "machine.kinds", "units"}}
assert ours <= {{f"hvhost.{{name}}" for name in plain}}, ours
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: hvhost")


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[-1:] not in (["rig"], [])])
def test_help_teaches(hvhost: Hvhost, words: list[str]) -> None:
    page = hvhost(*words, "-h").out
    assert f"Usage: hvhost {' '.join(words)}" in page
    if words not in (["version"], ["rig", "status"]):
        assert f"  hvhost {' '.join(words)}" in page.partition("Usage")[2]


def test_every_command_is_listed_whole(hvhost: Hvhost) -> None:
    page = hvhost("--help").out.partition("Commands:")[2]
    for words in COMMANDS[1:]:
        assert f"\n  {words[0]} " in page
    assert "..." not in page


def test_without_a_command_it_shows_how(hvhost: Hvhost) -> None:
    result = hvhost()
    assert result.status == 2
    assert "Usage: hvhost" in result.out + result.err


@pytest.mark.parametrize(
    "words",
    [
        ["frobnicate"],
        ["info"],
        ["run"],
        ["run", "--kernel", "k", "--guest", "g"],
        ["run", "--guest", "g", "--initrd", "i"],
        ["run", "--kernel", "k", "--cpus", "two"],
        ["run", "--kernel", "k", "--kvm", "xen"],
        ["console", "m", "--port", "3"],
        ["stop", "m", "--timeout", "-1"],
        ["verify", "--guest", "g", "--kernel", "k"],
        ["verify", "--modules", "m"],
        ["verify", "stray.deb"],
        ["verify", "--rows", ""],
        ["verify", "--rows", " ,"],
        ["verify", "--guest", ""],
        ["rig", "exec"],
    ],
)
def test_wrong_usage(hvhost: Hvhost, words: list[str]) -> None:
    result = hvhost(*words)
    assert result.status == 2
    assert "Error: " in result.err
    assert "Traceback" not in result.err


def test_run_detached_and_the_rest_of_its_life(
    hvhost: Hvhost, runtime: Path, config: MachineConfig
) -> None:
    result = hvhost("run", "--name", "m1", "--kernel", config.kernel, "--memory", "1G", "--detach")
    assert (result.status, result.out) == (0, "m1\n")

    table = hvhost("ps").out
    for word in ("NAME", "m1", "running", "1 GiB", "ok", config.kernel):
        assert word in table
    [listing] = json.loads(hvhost("ps", "--json").out)
    assert (listing["name"], listing["info"]["memory"]) == ("m1", 1 << 30)

    page = hvhost("info", "m1").out
    for word in ("VMBus 5.3", "0x8100000601000000", "io 12,345", "57164f39-9115-4e78", "12 µs"):
        assert word in page
    assert json.loads(hvhost("info", "m1", "--json").out)["channels"][0]["name"] == "heartbeat"

    assert hvhost("nmi", "m1").status == 0
    assert hvhost("pause", "m1").status == 0
    assert "paused" in hvhost("ps").out
    assert "'m1' is paused" in hvhost.sentence("pause", "m1")
    assert hvhost("resume", "m1").status == 0
    assert "took the time after 0.5 ms" in hvhost("time", "m1", "sync").out
    taken = hvhost("time", "m1", "sync", "--json")
    assert (taken.status, json.loads(taken.out)) == (0, {"seconds": 0.0005})
    assert hvhost("restart", "m1").status == 0
    assert hvhost("restart", "--force", "m1").status == 0
    assert MachineClient("m1").info().boots == 3
    assert "is running already" in hvhost.sentence("run", "--name", "m1", "--kernel", config.kernel)
    assert hvhost("stop", "m1").status == 0
    assert MachineDirectory.of("m1").state() is NameState.FREE
    assert "no running machine 'm1'" in hvhost.sentence("info", "m1")
    assert hvhost("rm", "m1").out == "m1\n"
    assert "nothing is left of a machine 'm1'" in hvhost.sentence("rm", "m1")


def test_what_is_left_of_machines_is_removed(
    hvhost: Hvhost, runtime: Path, config: MachineConfig
) -> None:
    for name in ("m1", "m2"):
        worker = launch(replace(config, name=name), detach=True)
        worker.process.kill()
        worker.process.wait()
    running = launch(replace(config, name="m3"), detach=True)
    for words in ((), ("m1", "--all")):
        assert hvhost.sentence("rm", *words) == "name the machines to remove, or say --all."
    assert "'m3' is running; stop it" in hvhost.sentence("rm", "m3")
    assert hvhost("rm", "--all").out == "m1\nm2\n"
    assert hvhost("rm", "--all").out == ""
    assert hvhost("ps").out.count("m3") == 1
    running.stop()


def test_key_value_pairs(hvhost: Hvhost, runtime: Path, config: MachineConfig) -> None:
    worker = launch(config, detach=True)
    assert hvhost("kvp", "m1", "set", "role", "web").status == 0
    assert hvhost("kvp", "m1", "set", "[red]x", "a\x1b[2Jb", "--pool", "guest").status == 0
    table = hvhost("kvp", "m1", "list").out
    for word in ("POOL", "external", "role", "web", "guest", "[red]x", "a\ufffd[2Jb"):
        assert word in table
    assert "web" not in hvhost("kvp", "m1", "list", "--pool", "guest").out
    [record] = json.loads(hvhost("kvp", "m1", "list", "--pool", "external", "--json").out)
    assert record == {"pool": "external", "key": "role", "value": "web"}
    assert hvhost("kvp", "m1", "get", "role").out == "web\n"
    assert json.loads(hvhost("kvp", "m1", "get", "role", "--json").out) == record
    assert hvhost("kvp", "m1", "delete", "role").status == 0
    assert "no item 'role'" in hvhost.sentence("kvp", "m1", "get", "role")
    worker.stop()


def test_what_ps_says_of_the_dead(hvhost: Hvhost, runtime: Path, config: MachineConfig) -> None:
    worker = launch(config, detach=True)
    worker.process.kill()
    worker.process.wait()
    assert "dead" in hvhost("ps").out
    assert "has died" in hvhost.sentence("info", "m1")


def test_a_crash_is_shown(
    hvhost: Hvhost, runtime: Path, config: MachineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hvhost.machine.model import CrashReport, MachineState

    worker = launch(config, detach=True)
    info = replace(
        MachineClient("m1").info(),
        state=MachineState.CRASHED,
        crash=CrashReport((1, 2, 3, 4, 5), "Kernel panic [0]", 90.0),
        last_stop="crash",
        error="no more",
    )
    monkeypatch.setattr(MachineClient, "info", lambda _: info)
    page = hvhost("info", "m1").out
    for word in ("crashed", "after 1 min 30 s: 0x1 0x2", "Kernel panic [0]", "no more"):
        assert word in page
    worker.stop()


@pytest.mark.parametrize(
    "command", ["info", "console", "stop", "restart", "nmi", "pause", "resume"]
)
def test_no_such_machine(hvhost: Hvhost, runtime: Path, command: str) -> None:
    sentence = hvhost.sentence(command, "nobody")
    assert sentence == "there is no running machine 'nobody'; `hvhost ps` lists those there are."
    assert "cannot be a machine's name" in hvhost.sentence(command, "no/body")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--kernel", "/nowhere"], "there is no kernel '/nowhere'"),
        (["--kernel", "/etc"], "is not a file"),
        (["--kernel", "KERNEL", "--initrd", "/nowhere"], "there is no initrd"),
        (["--kernel", "KERNEL", "--memory", "lots"], "memory 'lots' is not a size"),
        (["--kernel", "KERNEL", "--memory", "1"], "too little"),
        (["--kernel", "KERNEL", "--memory", "9999T"], "more than the"),
        (["--kernel", "KERNEL", "--cpus", "0"], "at least one CPU"),
        (["--kernel", "KERNEL", "--name", "a b"], "cannot be a machine's name"),
        (["--kernel", "KERNEL", "--append", "fail"], "no KVM here; buy one."),
        (["--kernel", "KERNEL", "--append", "fail-silently"], "ended with status 3"),
        (["--guest", "plan-9"], "There is no guest plan-9"),
    ],
)
@pytest.mark.parametrize("detach", [[], ["--detach"]])
def test_a_start_that_cannot_be(
    hvhost: Hvhost,
    runtime: Path,
    config: MachineConfig,
    words: list[str],
    said: str,
    detach: list[str],
) -> None:
    words = [config.kernel if word == "KERNEL" else word for word in words]
    assert said in hvhost.sentence("run", *words, *detach)


def test_a_stop_that_is_not_obeyed(hvhost: Hvhost, runtime: Path, config: MachineConfig) -> None:
    worker = launch(replace(config, command_line="stubborn"), detach=True)
    assert "hvhost stop --force m1" in hvhost.sentence("stop", "m1", "--timeout", "0.1")
    assert hvhost("stop", "--force", "m1").status == 0
    assert worker.process.wait(5) == 0


def test_run_of_a_known_guest(hvhost: Hvhost, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []
    started: list[MachineConfig] = []

    def define_guest(guest: str, **settings: Any) -> MachineConfig:
        settings.pop("progress")("downloading a kernel")
        asked.append((guest, settings))
        return MachineConfig(name="g", kernel="k")

    monkeypatch.setattr(definition, "define_guest", define_guest)
    monkeypatch.setattr(foreground, "run", lambda config, **_: started.append(config))
    result = hvhost("run", "--guest", "debian-12", "--append", "quiet", "--kvm", "rig")
    assert (result.status, result.err) == (0, "hvhost: downloading a kernel…\n")
    assert asked[0][0] == "debian-12"
    assert asked[0][1]["command_line"] == "quiet"
    assert asked[0][1]["transport"] is Transport.RIG
    assert started == [MachineConfig(name="g", kernel="k")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cpus", "0"], "a machine needs at least one CPU"),
        (["--memory", "1M"], "1 MiB of memory is too little"),
        (["--memory", "9999T"], "more than the"),
        (["--name", "a b"], "cannot be a machine's name"),
        (["--mmio-low", "1K"], "the low MMIO gap cannot be 1 KiB"),
        (["--memory-minimum", "1G"], "memory"),
        (["--disk", "/no/disk.vhdx"], "there is no disk '/no/disk.vhdx'"),
        (["--disk", "x.img,loud"], "'loud' is no option of a drive"),
        (["--dvd", "/no/x.iso"], "there is no dvd '/no/x.iso'"),
        (["--fibre-channel", "xx"], "is no world-wide name"),
    ],
)
def test_what_is_wrong_is_said_before_a_guest_is_fetched(
    hvhost: Hvhost, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    def define_guest(*_: Any, **__: Any) -> MachineConfig:
        raise AssertionError("fetched although the machine cannot be")

    monkeypatch.setattr(definition, "define_guest", define_guest)
    assert said in hvhost.sentence("run", "--guest", "debian-12", *words)


def test_verify_passes_everything_on(hvhost: Hvhost, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[VerifyOptions] = []

    def verify(options: VerifyOptions) -> int:
        asked.append(options)
        return 7

    monkeypatch.setattr(verify_command, "verify", verify)
    assert hvhost("verify").status == 7
    assert asked.pop() == VerifyOptions()
    words = "--kernel k --modules d --rows smp,nmi --cpus 3 --memory 1G --json j --svg p"
    more = "--daemons sid --keep-logs l --allow-lacks pae, --baseline b --kvm local --append nopv"
    assert hvhost("verify", *words.split(), *more.split()).status == 7
    assert asked.pop() == VerifyOptions(
        kernel=Path("k"),
        modules=Path("d"),
        daemons="sid",
        rows=["smp", "nmi"],
        cpus=3,
        memory=1 << 30,
        json_path=Path("j"),
        svg_path=Path("p"),
        keep_logs=Path("l"),
        allow_lacks=["pae"],
        baseline=Path("b"),
        transport=Transport.LOCAL,
        append="nopv",
    )
    hvhost("verify", "--deb", "a.deb", "b.deb", "--deb", "c.deb")
    assert asked.pop().debs == [Path("a.deb"), Path("c.deb"), Path("b.deb")]
    assert "memory 'x' is not a size" in hvhost.sentence("verify", "--memory", "x")


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        (["verify", "--guest", "nosuch"], ", or give a kernel with --kernel or --deb."),
        (["run", "--guest", "nosuch"], ", or give a kernel with --kernel."),
        (["guest", "build", "nosuch"], "."),
    ],
)
def test_an_unknown_guest_and_what_this_command_takes_instead(
    hvhost: Hvhost, runtime: Path, words: list[str], instead: str
) -> None:
    known = ", ".join((*GUESTS, *FULL_GUESTS))
    said = hvhost(*words).err.splitlines()[-1]
    assert said == f"hvhost: There is no guest nosuch; choose one of {known}{instead}"


@pytest.mark.parametrize("version", ["1.2.3", None])
def test_the_version(
    hvhost: Hvhost,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    version: str | None,
) -> None:
    monkeypatch.setattr(version_module, "own_version", lambda: version)
    said = f"hvhost {version or '(not installed: run from its source tree)'}\n"
    assert hvhost("version").out == said
    assert json.loads(hvhost("version", "--json").out) == {"version": version}
    result = hvhost("--version", "doctor")  # by the command line's library
    assert (result.status, result.out) == (0, said)
    monkeypatch.setattr(sys, "argv", ["hvhost", "--version"])
    main()
    assert capsys.readouterr().out == said


def test_known_guests_for_programs(hvhost: Hvhost) -> None:
    listed = json.loads(hvhost("guest", "list", "--json").out)
    assert [each["name"] for each in listed] == [*GUESTS, *FULL_GUESTS]
    assert {each["name"] for each in listed if each["complete"]} == {*FULL_GUESTS}
    assert {"name": "sid", "title": "Debian sid, cloud kernel", "complete": False} in listed


@pytest.mark.parametrize(
    "words",
    [["kvp", "list"], ["kvp", "get", "OSName"], ["time", "sync", "--json"], ["drive", "list", "m"]],
)
def test_the_machines_name_comes_first(hvhost: Hvhost, words: list[str]) -> None:
    result = hvhost(*words)
    assert result.status == 2
    assert f"name comes first: hvhost {words[0]} NAME {words[1]}." in " ".join(result.err.split())


def test_a_machine_may_be_called_like_a_command(hvhost: Hvhost, runtime: Path) -> None:
    assert "no running machine 'list'" in hvhost.sentence("kvp", "list", "list")


def test_doctor_shows_what_to_do(hvhost: Hvhost, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Check("qemu", CheckStatus.MISSING, "there is no qemu", "sudo apt-get install qemu [x]")
    good = Check("disk", CheckStatus.OK, "50 GiB free")
    monkeypatch.setattr(doctor_module, "examine", lambda: Diagnosis(False, None, [bad, good]))
    result = hvhost("doctor")
    assert result.status == 1
    for word in ("there is no qemu", "qemu: sudo apt-get install qemu [x]", "50 GiB free"):
        assert word in result.out
    assert json.loads(hvhost("doctor", "--json").out)["checks"][0]["status"] == "missing"
    for transport, word in (("local", "own KVM"), ("rig", "the rig")):
        diagnosis = Diagnosis(True, transport, [good])
        monkeypatch.setattr(doctor_module, "examine", lambda found=diagnosis: found)
        result = hvhost("doctor")
        assert result.status == 0
        assert word in result.out


def test_rig_runs_what_follows_the_dashes(hvhost: Hvhost, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def execute(command: list[str]) -> int:
        asked.append(command)
        return 42

    module = ModuleType("hvhost.rig.execute")
    monkeypatch.setattr(module, "execute", execute, raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert hvhost("rig", "exec", "--", "qemu", "-accel", "kvm", "--help").status == 42
    assert hvhost("rig", "exec", "ls", "-l").status == 42
    assert asked == [["qemu", "-accel", "kvm", "--help"], ["ls", "-l"]]


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (HvHostError("it broke; mend it."), 1, "hvhost: it broke; mend it.\n"),
        (OSError(28, "No space left on device", "/x"), 1, "hvhost: /x: No space left on device.\n"),
        (OSError("odd"), 1, "hvhost: odd.\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_how_errors_end(
    hvhost: Hvhost, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, said: str
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(doctor_module, "examine", fail)
    result = hvhost("doctor")
    assert (result.status, result.err) == (status, said)


def test_a_reader_that_leaves_early(runtime: Path) -> None:
    code = "from hvhost.cli.main import main; main()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", code, "doctor"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
        assert process.wait(20) == 1


def test_python_m_hvhost() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "hvhost", "version"],
        env=environment,
        capture_output=True,
        check=True,
    )
    assert done.stdout.startswith(b"hvhost ")


def test_completion_offers_the_commands(hvhost: Hvhost, monkeypatch: pytest.MonkeyPatch) -> None:
    assert app.info.name == "hvhost"
    monkeypatch.setenv("_HVHOST_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "hvhost re")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert hvhost().out.split() == ["restart", "resume"]
