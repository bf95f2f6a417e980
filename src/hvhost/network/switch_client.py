"""Speaking to a switch's process: joining it, asking it, capturing from it, starting and ending it.

A switch's socket takes messages (SOCK_SEQPACKET). The first one each way is JSON: a :class:`Hello`,
and ``{}``, an answer, or ``{"error": sentence}``. On an adapter's connection every further message
is a frame behind its offload header; on a capture's, a frame behind ``CAPTURE_HEADER``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from hvhost.errors import HvHostError
from hvhost.network.config import AdapterConfig, PortForward, Uplink
from hvhost.network.wires import enlarge
from hvhost.paths import runtime_dir

SOCKET_NAME: Final = "switch.sock"
#: Nanoseconds since 1970, and the frame's bytes.
CAPTURE_HEADER: Final = struct.Struct("<QI")
_CONFIG_NAME = "switch.json"
_ANSWER_LIMIT = 1 << 20
_ANSWER_SECONDS = 10.0
_START_SECONDS = 30.0
_PCAP_HEADER = struct.Struct("<IHHiIII")
_PCAP_RECORD = struct.Struct("<IIII")
_PCAP_NANOSECONDS = 0xA1B23C4D
_LINKTYPE_ETHERNET = 1


@dataclass(frozen=True, slots=True)
class Hello:
    """What a connection is for: ``adapter``, ``tap``, ``info``, or ``capture``.

    With ``tap`` comes a descriptor, which is plugged in instead of the connection. A capture is of
    the port *name*, or of all.
    """

    purpose: str
    name: str = ""
    vlan: int = 0
    trunk: tuple[int, ...] = ()
    isolated: bool = False
    rate: int = 0


def decode_hello(message: bytes) -> Hello:
    """A connection's first message; :class:`HvHostError` if it is none."""
    try:
        values = json.loads(message)
        hello = Hello(**{**values, "trunk": tuple(values.get("trunk", ()))})
    except (ValueError, TypeError, AttributeError):
        raise HvHostError("the switch does not understand what it was told first.") from None
    if hello.purpose not in ("adapter", "tap", "info", "capture"):
        raise HvHostError(f"the switch has nothing for {hello.purpose!r}.")
    return hello


@dataclass(frozen=True, slots=True)
class SwitchConfig:
    """A switch: its name, and the adapter of this computer's that is its uplink, if any."""

    name: str
    uplink: AdapterConfig | None

    @staticmethod
    def load(directory: Path) -> SwitchConfig:
        """What :meth:`save` wrote."""
        values = json.loads((directory / _CONFIG_NAME).read_text())
        uplink = values["uplink"]
        if uplink is not None:
            uplink["uplink"] = Uplink(uplink["uplink"])
            uplink["trunk"] = tuple(uplink["trunk"])
            uplink["forwards"] = tuple(PortForward(**each) for each in uplink["forwards"])
            uplink = AdapterConfig(**uplink)
        return SwitchConfig(values["name"], uplink)

    def save(self, directory: Path) -> None:
        (directory / _CONFIG_NAME).write_text(json.dumps(asdict(self)))


def switch_directory(name: str) -> Path:
    """Where the switch *name* has its socket."""
    return runtime_dir("switches") / name


def switch_names() -> list[str]:
    """The switches that run."""
    return sorted(path.parent.name for path in runtime_dir("switches").glob(f"*/{SOCKET_NAME}"))


def connect(
    name: str, hello: Hello, descriptors: Sequence[int] = ()
) -> tuple[socket.socket, dict[str, Any]]:
    """A connection to the switch *name* and its first answer; :class:`HvHostError` if refused."""
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stream.settimeout(_ANSWER_SECONDS)
    try:
        stream.connect(str(switch_directory(name) / SOCKET_NAME))
        socket.send_fds(stream, [json.dumps(asdict(hello)).encode()], list(descriptors))
        answer = json.loads(stream.recv(_ANSWER_LIMIT) or b'{"error": "the switch hung up."}')
    except (OSError, ValueError) as error:
        stream.close()
        raise HvHostError(_no_answer(name, error)) from error
    if "error" in answer:
        stream.close()
        raise HvHostError(str(answer["error"]))
    return stream, answer


def _no_answer(name: str, error: Exception) -> str:
    """Why a switch cannot be spoken to, and what to do."""
    if isinstance(error, FileNotFoundError | ConnectionRefusedError):
        # A refused one was killed; making it anew clears it away.
        there = ", ".join(each for each in switch_names() if each != name) or "none"
        return (
            f"there is no switch {name!r} (there are: {there}); make one with "
            f"`hvhost net create {name}`."
        )
    if isinstance(error, TimeoutError):
        return (
            f"the switch {name!r} has not answered for {_ANSWER_SECONDS:g} seconds; "
            f"{switch_directory(name) / 'pid'} names its process, which may be ended."
        )
    why = error.strerror if isinstance(error, OSError) and error.strerror else error
    return f"the switch {name!r} cannot be spoken to: {why}; see {switch_directory(name)}."


def join(config: AdapterConfig, machine: str) -> int:
    """A descriptor of a new port, for an adapter of *machine*."""
    name = f"{machine}/{config.name}"
    hello = Hello("adapter", name, config.vlan, config.trunk, config.isolated, config.rate)
    stream, _ = connect(config.target, hello)
    stream.setblocking(False)
    enlarge(stream)
    return stream.detach()


def attach(name: str, hello: Hello, descriptor: int) -> None:
    """Plug a tap device's descriptor, which is given away, into a new port."""
    try:
        stream, _ = connect(name, hello, [descriptor])
    finally:
        os.close(descriptor)
    stream.close()


def info(name: str) -> dict[str, Any]:
    """What the switch says of itself."""
    stream, answer = connect(name, Hello("info"))
    stream.close()
    return answer


def survey() -> tuple[list[dict[str, Any]], list[str]]:
    """What each switch that runs says of itself; and of those that say nothing, why.

    One that was killed is none, though its socket is still there.
    """
    found, silent = [], []
    for name in switch_names():
        try:
            found.append(info(name))
        except HvHostError as error:
            if not isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError):
                silent.append(str(error))
    return found, silent


def check_port(name: str, port: str) -> None:
    """:class:`HvHostError` unless the switch *name* answers and has that port, or *port* is ''."""
    ports = [str(each["name"]) for each in info(name)["ports"]]
    if port and port not in ports:
        there = ", ".join(ports) or "none"
        raise HvHostError(f"the switch {name!r} has no port {port!r}; there are: {there}.")


def capture(name: str, port: str, file: BinaryIO, going: Callable[[], bool] = lambda: True) -> int:
    """Write the frames of a switch as pcap until *going* says no or the switch ends; how many.

    *port* names the one whose frames they are, or is empty: see :func:`check_port`.
    """
    file.write(_PCAP_HEADER.pack(_PCAP_NANOSECONDS, 2, 4, 0, 0, 1 << 18, _LINKTYPE_ETHERNET))
    file.flush()
    stream, _ = connect(name, Hello("capture", port))
    enlarge(stream)
    stream.settimeout(0.5)
    count = 0
    with stream:
        while going():
            try:
                message = stream.recv(1 << 17)
            except TimeoutError:
                file.flush()
                continue
            if not message:
                break
            stamp, size = CAPTURE_HEADER.unpack_from(message)
            seconds, nanoseconds = divmod(stamp, 1_000_000_000)
            data = message[CAPTURE_HEADER.size :]
            file.write(_PCAP_RECORD.pack(seconds, nanoseconds, len(data), size) + data)
            count += 1
    file.flush()
    return count


def start(config: SwitchConfig) -> None:
    """Start a switch's process, which goes on without us."""
    directory = switch_directory(config.name)
    if (directory / SOCKET_NAME).exists():
        try:
            info(config.name)
        except HvHostError:
            shutil.rmtree(directory)
        else:
            raise HvHostError(f"there is a switch {config.name!r} already.")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    config.save(directory)
    with (directory / "switch.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "hvhost.network.switch_process", str(directory)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    assert process.stdout is not None
    with process.stdout:
        if process.stdout.readline() != b"ready\n":
            process.wait()
            said = (directory / "switch.log").read_text(errors="replace").strip().splitlines()
            shutil.rmtree(directory)
            reason = said[-1].removeprefix("error: ") if said else "it said nothing"
            raise HvHostError(f"the switch {config.name!r} did not start: {reason}")


def stop(name: str) -> None:
    """End a switch; the adapters in it lose their link."""
    pid = int(info(name)["pid"])
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _START_SECONDS
    while (switch_directory(name) / SOCKET_NAME).exists():
        if time.monotonic() > deadline:
            raise HvHostError(f"the switch {name!r}, process {pid}, does not end.")
        time.sleep(0.02)
    shutil.rmtree(switch_directory(name), ignore_errors=True)
