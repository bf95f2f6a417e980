"""The files of a verification: seen to be possible before it begins, written when it has ended."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from hvhost.errors import HvHostError
from hvhost.verify.options import VerifyOptions
from hvhost.verify.report import render_svg
from hvhost.verify.results import VerifyReport
from hvhost.verify.session import Session


def _check_file(path: Path) -> None:
    """:class:`OSError` if a file cannot be written there; changes none that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if path.is_file():
        path.open("ab").close()
    elif not path.exists():  # a pipe would notice being opened
        _check_directory(path.resolve().parent)


def _check_directory(path: Path) -> None:
    """:class:`OSError` if there cannot be files in this directory, which is made if need be."""
    path.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()


def check_outputs(options: VerifyOptions) -> None:
    """:class:`HvHostError`, naming the path, if what is to be kept cannot be."""
    for option, path, check in (
        ("--json", options.json_path, _check_file),
        ("--svg", options.svg_path, _check_file),
        ("--keep-logs", options.keep_logs, _check_directory),
    ):
        if path is None:
            continue
        try:
            check(path)
        except OSError as error:
            # Of mkdir: what is to be the directory is a file.
            exists = isinstance(error, FileExistsError)
            why = os.strerror(errno.ENOTDIR) if exists else error.strerror
            raise HvHostError(
                f"{path} cannot be written: {why}; give {option} another path."
            ) from None


class Outputs:
    """Writes what *options* want to be kept; what cannot be written keeps nothing else from it."""

    def __init__(self, options: VerifyOptions) -> None:
        self._options = options
        self._problems: list[str] = []

    @contextmanager
    def _noting(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._problems.append(f"{error.filename or path} cannot be written: {error.strerror}")

    def _write(self, path: Path, text: str) -> None:
        with self._noting(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

    def keep_session(self, session: Session) -> None:
        """Consoles, events, logs, and what rows drew; never raises for a file."""
        directory = self._options.keep_logs
        if directory is None:
            return
        for number, console in enumerate(session.consoles, 1):
            suffix = "" if number == 1 else f"-{number}"
            self._write(directory / f"console{suffix}.log", console)
        events = [asdict(event) for event in session.events]
        self._write(directory / "events.json", json.dumps(events, indent=2) + "\n")
        for name, text in session.attachments.items():
            self._write(directory / name, text)
        for machine in session.machines:
            with self._noting(directory):
                machine.keep_logs(directory)

    def keep_report(self, report: VerifyReport) -> None:
        """The report in each form that was asked for; never raises for a file."""
        options = self._options
        if options.json_path is not None:
            self._write(options.json_path, report.to_json())
        if options.svg_path is not None:
            self._write(options.svg_path, render_svg(report))
        if options.keep_logs is not None:
            self._write(options.keep_logs / "report.json", report.to_json())

    def check_kept(self) -> None:
        """:class:`HvHostError` that names all that could not be written."""
        if self._problems:
            raise HvHostError(f"{'; '.join(self._problems)}; all else is kept.")
