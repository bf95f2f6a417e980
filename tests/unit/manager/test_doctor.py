from __future__ import annotations

import fcntl
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hvhost.errors import HvHostError
from hvhost.manager.doctor import KVM_CAPABILITIES, Check, Computer, Diagnosis, examine
from hvhost.units import GIB

AMD = "processor\t: 0\nflags\t\t: fpu svm sse\n"
NESTED = "processor\t: 0\nflags\t\t: fpu hypervisor sse\n"
PLAIN = "processor\t: 0\nflags\t\t: fpu sse\n"
MEMORY = "MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n"

Kvm = Callable[..., None]


@pytest.fixture
def computer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Computer:
    """A good computer, with a file for ``/dev/kvm``."""
    monkeypatch.setenv("HVHOST_CACHE_DIR", str(tmp_path / "cache"))
    for name, text in (
        ("kvm", ""),
        ("cpuinfo", AMD),
        ("meminfo", MEMORY),
        ("keyring", ""),
        ("libc.a", ""),
    ):
        (tmp_path / name).write_text(text)
    return Computer(
        kvm_device=tmp_path / "kvm",
        cpuinfo=tmp_path / "cpuinfo",
        meminfo=tmp_path / "meminfo",
        keyrings=(tmp_path / "keyring",),
        static_libraries=(tmp_path / "libc.a",),
        which=lambda program: f"/usr/bin/{program}",
        free_disk=lambda _: 50 * GIB,
        is_root=False,
        make_network=lambda: None,
    )


def no_network() -> None:
    raise HvHostError("no network namespace could be made (no answer).")


@pytest.fixture
def kvm(monkeypatch: pytest.MonkeyPatch) -> Kvm:
    """Sets what the device answers."""

    def answer(version: int = 12, lacking: tuple[str, ...] = ()) -> None:
        absent = {KVM_CAPABILITIES[name] for name in lacking}

        def ioctl(_: int, request: int, argument: int) -> int:
            if request == 0xAE00:
                return version
            assert request == 0xAE03
            return 0 if argument in absent else 1

        monkeypatch.setattr(fcntl, "ioctl", ioctl)

    answer()
    return answer


def of(diagnosis: Diagnosis, identity: str) -> Check:
    [check] = [check for check in diagnosis.checks if check.id == identity]
    return check


def test_a_good_computer(computer: Computer, kvm: Kvm) -> None:
    diagnosis = examine(computer)
    assert (diagnosis.usable, diagnosis.transport) == (True, "local")
    assert {check.status for check in diagnosis.checks} == {"ok"}


@pytest.mark.parametrize("name", KVM_CAPABILITIES)
def test_every_lacking_capability_is_named(computer: Computer, kvm: Kvm, name: str) -> None:
    kvm(lacking=(name,))
    diagnosis = examine(computer)
    assert (diagnosis.usable, diagnosis.transport) == (True, "rig")
    check = of(diagnosis, "kvm-hyperv")
    assert check.status == "warning"
    assert check.finding == f"KVM lacks {name}"
    assert check.fix


def test_a_device_that_opens_is_not_enough(computer: Computer, kvm: Kvm) -> None:
    for cpuinfo, named in ((NESTED, "nested"), (PLAIN, "firmware")):
        computer.cpuinfo.write_text(cpuinfo)
        diagnosis = examine(computer)
        assert diagnosis.transport == "rig"
        assert named in str(of(diagnosis, "virtualization").fix)


def test_no_device(computer: Computer, kvm: Kvm) -> None:
    computer.kvm_device.unlink()
    diagnosis = examine(computer)
    assert diagnosis.transport == "rig"
    assert str(of(diagnosis, "kvm-device").fix).startswith("sudo ")
    assert not str(of(examine(replace(computer, is_root=True)), "kvm-device").fix).startswith("su")


def test_no_device_on_a_processor_without_virtualization(computer: Computer, kvm: Kvm) -> None:
    """No module would load, so none is named."""
    computer.kvm_device.unlink()
    computer.cpuinfo.write_text(NESTED)
    diagnosis = examine(computer)
    assert of(diagnosis, "kvm-device").fix == "mend virtualization first"
    assert "nested" in str(of(diagnosis, "virtualization").fix)


@pytest.mark.parametrize(
    ("program", "package"),
    [("passt", "passt"), ("ip", "iproute2"), ("mmdebstrap", "mmdebstrap"), ("mke2fs", "e2fsprogs")],
)
def test_what_only_some_features_need(
    computer: Computer, kvm: Kvm, program: str, package: str
) -> None:
    without = replace(computer, which=lambda name: None if name == program else f"/bin/{name}")
    diagnosis = examine(without)
    assert diagnosis.usable
    check = of(diagnosis, program)
    assert check.status == "warning"
    assert str(check.fix).endswith(f"apt-get install --no-install-recommends {package}")


def test_a_device_one_may_not_open(
    computer: Computer, kvm: Kvm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.open", refuse)
    assert "usermod -aG kvm" in str(of(examine(computer), "kvm-device").fix)


def test_something_else_than_kvm(computer: Computer, kvm: Kvm) -> None:
    kvm(version=11)
    assert "speaks KVM API 11" in of(examine(computer), "kvm-hyperv").finding


def test_a_device_that_is_no_kvm_at_all(computer: Computer) -> None:
    assert "cannot be asked" in of(examine(computer), "kvm-hyperv").finding  # a plain file


@pytest.mark.parametrize("program", ["qemu-system-x86_64", "gcc"])
def test_what_the_rig_needs(computer: Computer, kvm: Kvm, program: str) -> None:
    without = replace(computer, which=lambda name: None if name == program else f"/bin/{name}")
    identity = program.partition("-")[0]
    computer.cpuinfo.write_text(PLAIN)
    diagnosis = examine(without)
    assert not diagnosis.usable
    assert diagnosis.transport is None
    check = of(diagnosis, identity)
    assert check.status == "missing"
    assert str(check.fix).startswith("sudo apt-get install ")


def test_the_rigs_emulator_is_not_needed_with_kvm(computer: Computer, kvm: Kvm) -> None:
    diagnosis = examine(
        replace(computer, which=lambda name: None if "qemu" in name else f"/bin/{name}")
    )
    assert (diagnosis.usable, diagnosis.transport) == (True, "local")
    assert of(diagnosis, "qemu").status == "warning"


@pytest.mark.parametrize("identity", ["gcc", "libc"])
def test_what_builds_guests_is_needed_with_kvm_too(
    computer: Computer, kvm: Kvm, identity: str
) -> None:
    """The processors would run, but `hvhost verify` would have no probe."""
    if identity == "libc":
        computer.static_libraries[0].unlink()
    else:
        computer = replace(computer, which=lambda name: None if name == "gcc" else f"/bin/{name}")
    diagnosis = examine(computer)
    assert (diagnosis.usable, diagnosis.transport) == (False, "local")
    check = of(diagnosis, identity)
    assert check.status == "missing"
    assert str(check.fix).endswith(" libc6-dev")
    assert "hvhost verify" in of(diagnosis, "gcc").finding
    computer.cpuinfo.write_text(PLAIN)
    assert examine(computer).transport is None


def test_downloads_can_be_proved(computer: Computer, kvm: Kvm) -> None:
    computer.keyrings[0].unlink()
    check = of(examine(computer), "keyring")
    assert check.status == "warning"
    assert str(check.fix).endswith(" debian-archive-keyring")


def test_the_capabilities_are_those_of_the_kernels_header() -> None:
    assert {
        "KVM_CAP_HYPERV_SYNIC2": 148,
        "KVM_CAP_HYPERV_EVENTFD": 154,
        "KVM_CAP_HYPERV_SEND_IPI": 161,
        "KVM_CAP_X86_USER_SPACE_MSR": 188,
        "KVM_CAP_X86_MSR_FILTER": 189,
    }.items() <= KVM_CAPABILITIES.items()


def test_little_room(computer: Computer, kvm: Kvm) -> None:
    computer.meminfo.write_text("MemAvailable: 100000 kB\n")
    diagnosis = examine(replace(computer, free_disk=lambda _: 1000))
    assert of(diagnosis, "memory").status == of(diagnosis, "disk").status == "warning"
    assert "HVHOST_CACHE_DIR" in str(of(diagnosis, "disk").fix)


def test_no_place_for_the_cache(
    computer: Computer, kvm: Kvm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One finding among the others."""
    monkeypatch.setenv("HVHOST_CACHE_DIR", str(computer.cpuinfo / "cache"))
    diagnosis = examine(computer)
    assert not diagnosis.usable
    check = of(diagnosis, "disk")
    assert check.status == "missing"
    assert check.finding == f"{computer.cpuinfo}/cache cannot be made (Not a directory)"
    assert check.fix == "set HVHOST_CACHE_DIR to a directory of yours"


def test_every_problem_comes_with_a_remedy(computer: Computer, kvm: Kvm, tmp_path: Path) -> None:
    bad = Computer(
        kvm_device=tmp_path / "none",
        cpuinfo=computer.cpuinfo,
        meminfo=computer.meminfo,
        keyrings=(tmp_path / "none",),
        static_libraries=(tmp_path / "none",),
        which=lambda _: None,
        free_disk=lambda _: 0,
        is_root=False,
        make_network=no_network,
    )
    computer.cpuinfo.write_text(PLAIN)
    computer.meminfo.write_text("MemAvailable: 1 kB\n")
    for check in examine(bad).checks:
        assert check.status != "ok"
        assert check.fix or check.id == "apt"


def test_this_computer_can_be_examined() -> None:
    assert len(examine().checks) == 15


def test_a_network_is_made_to_see_whether_it_can_be(computer: Computer) -> None:
    (check,) = (each for each in examine(computer).checks if each.id == "network")
    assert (check.status, check.fix) == ("ok", None)
    lacking = examine(replace(computer, make_network=no_network))
    (check,) = (each for each in lacking.checks if each.id == "network")
    assert check.status == "warning" and "no network namespace could be made" in check.finding
    assert lacking.usable, "most rows need none"


def test_the_network_that_is_made_is_a_real_one(computer: Computer) -> None:
    before = set(Path("/proc/self/fd").iterdir())
    real = replace(computer, make_network=Computer().make_network)
    (check,) = (each for each in examine(real).checks if each.id == "network")
    if check.status != "ok":
        assert "no network namespace could be made" in check.finding
        pytest.skip(check.finding)
    assert len(set(Path("/proc/self/fd").iterdir())) == len(before)
