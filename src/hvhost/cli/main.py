"""The ``hvhost`` command's entry: runs it and turns errors into sentences."""

from __future__ import annotations

import sys

from hvhost.cli import plain
from hvhost.errors import HvHostError


def main() -> None:
    """Entry point; ends the process with 0, 1 (an error, in one sentence), 2 (usage) or 130."""
    try:
        if not plain.run(sys.argv[1:]):
            from hvhost.cli.app import app

            app(prog_name="hvhost")
    except HvHostError as error:
        print(f"hvhost: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"hvhost: {where}{error.strerror or error}.", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
