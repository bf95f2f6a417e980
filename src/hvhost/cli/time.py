"""``hvhost time``: the guest's clock."""

import typer

from hvhost.cli.machines import Json, MachineGroup, Name

app = typer.Typer(cls=MachineGroup, no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def machine(context: typer.Context, name: Name) -> None:
    """Set the clock of a machine's guest.

    The guest gets the host's time when it boots and hears of it every few seconds, for its own
    time daemon (chrony on /dev/ptp_hyperv). Its clock is set by the host only when asked.

    \b
    Example:
      hvhost time demo sync
    """
    context.obj = name


@app.command()
def sync(context: typer.Context, json: Json = False) -> None:
    """Have the guest set its clock to the host's now.

    Says how long the guest's driver took to take it.

    \b
    Examples:
      hvhost time demo sync
      hvhost time demo sync --json | jq .seconds
    """
    from hvhost.cli import output
    from hvhost.manager.client import MachineClient

    seconds = MachineClient(context.obj).time_sync()
    if json:
        output.print_json({"seconds": seconds})
    else:
        print(f"The guest of {context.obj} took the time after {seconds * 1e3:.1f} ms.")
