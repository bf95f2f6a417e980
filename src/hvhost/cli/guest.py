"""``hvhost guest``: the guests that are made from distribution packages."""

import sys
from typing import Annotated

import typer

from hvhost.cli.machines import Json

app = typer.Typer(
    name="guest",
    help="""Make guests from distribution packages, before `hvhost run --guest` needs them.

    \b
    Examples:
      hvhost guest build debian-12-full
      hvhost guest list
    """,
    short_help="Guests made from distribution packages.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def build(
    guest: Annotated[str, typer.Argument(metavar="GUEST", help="As in debian-12-full.")],
    full: Annotated[
        bool, typer.Option("--full", help="The complete system: debian-12 means debian-12-full.")
    ] = False,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Make it anew, of the newest packages.")
    ] = False,
    json: Json = False,
) -> None:
    """Make a guest, if it is not there, and print where its parts are.

    A complete system (-full) has a disk. Never write to that: it is the parent of what machines
    write. Copy it with `hvhost disk convert` to have one of your own.

    \b
    Examples:
      hvhost guest build debian-12-full --refresh
      hvhost guest build debian-12 --full --refresh
    """
    from hvhost.cli import output
    from hvhost.guests.build import prepare_guest
    from hvhost.guests.catalog import FULL_GUESTS

    if full and not guest.endswith("-full"):
        guest += "-full"
    parts: dict[str, str]
    if full or guest in FULL_GUESTS:
        from hvhost.guests.full import prepare_full

        system = prepare_full(guest, refresh=refresh, progress=_say)
        parts = {
            "kernel": str(system.kernel),
            "initrd": str(system.initrd),
            "append": system.command_line,
            "disk": str(system.disk),
        }
    else:
        images = prepare_guest(guest, refresh=refresh, progress=_say)
        parts = {"kernel": str(images.kernel), "initrd": str(images.initrd)}
    if json:
        output.print_json(parts)
    else:
        for name, value in parts.items():
            print(f"{name:8}{value}")


@app.command("list")
def list_(json: Json = False) -> None:
    """List the guests that are known by name.

    \b
    Examples:
      hvhost guest list
      hvhost guest list --json | jq -r '.[] | select(.complete) | .name'
    """
    from hvhost.guests.catalog import FULL_GUESTS, GUESTS

    titles = {name: recipe.title for name, recipe in GUESTS.items()}
    titles |= {name: recipe.title for name, recipe in FULL_GUESTS.items()}
    if json:
        from hvhost.cli import output

        output.print_json(
            [
                {"name": name, "title": title, "complete": name in FULL_GUESTS}
                for name, title in titles.items()
            ]
        )
        return
    for name, title in titles.items():
        print(f"{name:20}{title}")


def _say(message: str) -> None:
    print(f"hvhost: {message}…", file=sys.stderr)
