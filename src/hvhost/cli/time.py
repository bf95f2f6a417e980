"""``hvhost time``: the guest's clock."""

from __future__ import annotations

import typer

from hvhost.cli.machines import Name

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


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
def sync(context: typer.Context) -> None:
    """Have the guest set its clock to the host's now.

    \b
    Example:
      hvhost time demo sync
    """
    from hvhost.manager.client import MachineClient

    seconds = MachineClient(context.obj).time_sync()
    print(f"The guest of {context.obj} took the time after {seconds * 1e3:.1f} ms.")
