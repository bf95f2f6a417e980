"""``hvhost doctor``."""

from typing import Annotated

import typer


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Say what this computer can do, and what is missing.

    Each thing missing comes with the command that fixes it. The exit status is 1 if something
    hvhost cannot do without is missing.

    \b
    Examples:
      hvhost doctor
      hvhost doctor --json | jq '.checks[] | select(.status != "ok")'
    """
    from hvhost.cli import output
    from hvhost.manager.doctor import examine

    diagnosis = examine()
    if json:
        output.print_json(diagnosis)
    else:
        output.print_diagnosis(diagnosis)
    raise typer.Exit(0 if diagnosis.usable else 1)
