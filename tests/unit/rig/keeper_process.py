"""The rig's keeper with a stand-in for QEMU: ``keeper_process.py {"command": […], …}``.

``command`` is what is started in QEMU's place, with the socket's path after it; every other key is
a constant of :mod:`hvhost.rig.server`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from hvhost.process import die_with
from hvhost.rig import image, qemu, server


def main() -> int:
    settings = json.loads(sys.argv[1])
    command = settings.pop("command")
    for name, value in settings.items():
        assert hasattr(server, name)
        setattr(server, name, value)

    def start(
        arguments: Sequence[str], *, stdout: int | IO[bytes] = subprocess.DEVNULL
    ) -> subprocess.Popen[bytes]:
        (chardev,) = [each for each in arguments if each.startswith("socket,id=shared,path=")]
        return subprocess.Popen(
            [*command, chardev.split("path=", 1)[1]],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with(os.getpid(), signal.SIGKILL),
        )

    qemu.start = start
    image.rig_image = lambda progress: (Path("/kernel"), Path("/initrd"))
    return server.main()


if __name__ == "__main__":
    sys.exit(main())
