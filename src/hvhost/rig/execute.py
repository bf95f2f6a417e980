"""``hvhost rig exec``: a command inside a software KVM host that sees this computer's files.

Another QEMU than the shared rig: a full distribution kernel (it has 9p), this computer's root
read-only below an overlay in memory, and a real ``/dev/kvm``. So the local transport, and other
VMMs, run on computers without hardware virtualization.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hvhost.errors import HvHostError
from hvhost.guests import apt, cpio, deb
from hvhost.rig import image, qemu

DEFAULT_MEMORY_MIB = 4096
SCRIPT = Path(__file__).with_name("execute.sh")
START_SECONDS = 300.0
"""How long the host may take until the command starts; a busy computer needs minutes."""
START_ATTEMPTS = 2
_CONNECT_SECONDS = 30.0
_STARTED = b"started\n"
STREAMS = ("stdin", "stdout", "stderr", "status")
_MODULES = dict.fromkeys(
    ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay", "tun", "loop", "kvm_amd"), ""
)
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "PYTHONPATH", "VIRTUAL_ENV", "TERM", "XDG_CACHE_HOME")


def command_script(command: Sequence[str], directory: str, environment: dict[str, str]) -> str:
    """The shell script that runs *command* in *directory* with a clean *environment*."""
    kept = {
        name: value
        for name, value in environment.items()
        if name in _KEPT_VARIABLES or name.startswith("HVHOST_")
    }
    kept["HVHOST_RUNTIME_DIR"] = "/run/hvhost"
    assignments = " ".join(shlex.quote(f"{name}={value}") for name, value in kept.items())
    return (
        f"cd {shlex.quote(directory)} || exit 125\n"
        f"exec env -i {assignments} {shlex.join(command)}\n"
    )


def _base_image(progress: Callable[[str], None]) -> tuple[Path, Path]:
    kernel = image.rig_kernel("linux-image-amd64", progress)
    busybox = deb.extract(apt.download("bookworm", ["busybox-static"], progress=progress))
    entries = [
        cpio.directory("bin"),
        cpio.directory("dev"),
        cpio.character_device("dev/console", 5, 1),
        cpio.file("bin/busybox", (busybox / "bin/busybox").read_bytes(), 0o755),
        cpio.file("bin/keep", image.build_agent().read_bytes(), 0o755),
        cpio.file("init", SCRIPT.read_bytes(), 0o755),
        *image.module_entries(kernel.modules, _MODULES),
    ]
    return kernel.kernel, image.build_archive("execute", entries)


def _arguments(kernel: Path, initrd: Path, directory: Path, memory_mib: int) -> list[str]:
    arguments = [
        *qemu.machine_arguments(kernel, initrd, memory_mib, "console=ttyS0 maxcpus=1"),
        *("-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"),
        *("-device", "virtio-serial-pci"),
        *("-serial", "stdio"),
    ]
    for stream in STREAMS:
        arguments += ["-chardev", f"socket,id={stream},path={directory / stream}"]
        arguments += ["-device", f"virtserialport,chardev={stream},name=hvhost.{stream}"]
    return arguments


class _NotStartedError(HvHostError):
    """The host hangs and the command was not begun: another try does nothing twice."""


class _Streams:
    """The command's streams, relayed between QEMU's sockets and ours until its status comes."""

    def __init__(self, connections: dict[str, socket.socket]) -> None:
        self._connections = connections
        self._started = False
        self._status = b""

    def relay(self, process: subprocess.Popen[bytes], console: Path) -> int:
        """Until the command ends; its exit status. :class:`_NotStartedError` if it does not begin.

        A command may take as long as it likes, so only the way to its start has a limit.
        """
        start_by = time.monotonic() + START_SECONDS
        selector = selectors.DefaultSelector()
        for name in ("stdout", "stderr", "status"):
            selector.register(self._connections[name], selectors.EVENT_READ, name)
        deadline = None
        while True:
            wait = 1.0 if deadline is None else max(0.0, deadline - time.monotonic())
            for key, _ in selector.select(wait):
                self._move(str(key.data), selector)
            if deadline is None and self._status.endswith(b"\n"):
                deadline = time.monotonic() + 0.3  # what the command said last is still on its way
            if deadline is not None and time.monotonic() >= deadline:
                return int(self._status)
            if process.poll() is not None:
                raise HvHostError(f"the rig ended before the command did: {_last_line(console)}")
            if not self._started and not self._status and time.monotonic() > start_by:
                raise _NotStartedError(
                    f"the rig hangs: after {START_SECONDS:.0f} s it had not started the command; "
                    f"its last line is: {_last_line(console)}"
                )

    def _take_stdin(self, selector: selectors.DefaultSelector) -> None:
        """From now on: what is sent before somebody reads there is lost."""
        try:
            selector.register(sys.stdin.fileno(), selectors.EVENT_READ, "stdin")
        except PermissionError:  # epoll takes no files; they never block either
            with (
                open(sys.stdin.fileno(), "rb", closefd=False) as file,
                self._connections["stdin"].makefile("wb") as port,
            ):
                shutil.copyfileobj(file, port)
            self._connections["stdin"].shutdown(socket.SHUT_WR)
        except (OSError, ValueError):  # there is no standard input
            self._connections["stdin"].shutdown(socket.SHUT_WR)

    def _move(self, name: str, selector: selectors.DefaultSelector) -> None:
        if name == "stdin":
            data = os.read(sys.stdin.fileno(), 65536)
            if data:
                self._connections["stdin"].sendall(data)
            else:
                selector.unregister(sys.stdin.fileno())
                self._connections["stdin"].shutdown(socket.SHUT_WR)
            return
        data = self._connections[name].recv(65536)
        if not data:
            selector.unregister(self._connections[name])
        elif name == "status":
            if data.startswith(_STARTED):
                data = data.removeprefix(_STARTED)
                self._started = True
                self._take_stdin(selector)
            self._status += data
        else:
            target = sys.stdout if name == "stdout" else sys.stderr
            target.buffer.write(data)
            target.buffer.flush()


def _last_line(console: Path) -> str:
    last = console.read_text(errors="replace").strip().splitlines()[-1:]
    return last[0] if last else "no output"


def _attempt(kernel: Path, base: Path, script: str, memory_mib: int) -> int:
    """One software KVM host, from its start to the *script*'s exit status."""
    with (
        tempfile.TemporaryDirectory(prefix="hvhost-exec-") as name,
        contextlib.ExitStack() as open_,
    ):
        directory = Path(name)
        initrd = directory / "initrd"
        initrd.write_bytes(
            base.read_bytes() + cpio.archive([cpio.file("command", script.encode())])
        )
        listeners = {}
        for stream in STREAMS:
            listeners[stream] = open_.enter_context(socket.socket(socket.AF_UNIX))
            listeners[stream].bind(str(directory / stream))
            listeners[stream].listen(1)
            listeners[stream].settimeout(_CONNECT_SECONDS)
        console = directory / "console"
        with console.open("wb") as output:
            process = qemu.start(_arguments(kernel, initrd, directory, memory_mib), stdout=output)
        try:
            try:
                connections = {
                    stream: open_.enter_context(listeners[stream].accept()[0]) for stream in STREAMS
                }
            except TimeoutError:
                reason = console.read_text(errors="replace").strip()
                raise HvHostError(f"QEMU did not start: {reason or 'it said nothing'}") from None
            return _Streams(connections).relay(process, console)
        finally:
            process.kill()
            process.wait()


def execute(
    command: Sequence[str],
    *,
    memory_mib: int = DEFAULT_MEMORY_MIB,
    progress: Callable[[str], None] = lambda text: None,
) -> int:
    """Run *command* in a software KVM host; its exit status.

    It sees this computer's files and may change its own view of them; the changes are gone with
    it. :class:`HvHostError` when the host does not come up or dies; one that hangs before it has
    begun the command is given up for another.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # clean up first
    kernel, base = _base_image(progress)
    script = command_script(command, str(Path.cwd()), dict(os.environ))
    for _ in range(1, START_ATTEMPTS):
        try:
            return _attempt(kernel, base, script, memory_mib)
        except _NotStartedError as error:
            progress(f"{error}; trying again")
    return _attempt(kernel, base, script, memory_mib)
