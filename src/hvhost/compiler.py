"""Small static C programs that run in guests and in the rig: compiled once, then cached."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hvhost.errors import HvHostError
from hvhost.paths import cache_dir


def build_static(source: Path, headers: Sequence[Path] = (), options: Sequence[str] = ()) -> Path:
    """The program of *source*, static; cached by the content of its source and *headers*.

    :class:`HvHostError` when there is no C compiler or it fails.
    """
    digest = hashlib.sha256(" ".join(options).encode())
    for path in (source, *headers):
        digest.update(path.read_bytes())
    target = cache_dir("programs") / f"{source.stem}-{digest.hexdigest()[:16]}"
    if target.exists():
        return target
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise HvHostError(
            f"There is no C compiler for {source.name}; run `apt-get install gcc libc6-dev`."
        )
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        output = Path(directory) / "program"
        command = [compiler, "-static", "-Os", "-s", "-Wall", *options]
        try:
            subprocess.run(
                [*command, "-o", str(output), str(source)],
                capture_output=True,
                text=True,
                check=True,
            )
        except (OSError, subprocess.CalledProcessError) as error:
            said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
            reason = (said.strip().splitlines() or ["it said nothing"])[-1]
            raise HvHostError(
                f"{compiler} could not build {source.name} ({reason}); "
                "run `apt-get install gcc libc6-dev`."
            ) from error
        output.replace(target)
    return target
