"""Commands about machines that run, from ``ps`` to ``nmi``."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a running machine.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Timeout = Annotated[
    float, typer.Option(metavar="SECONDS", min=0.0, help="How long to wait for the guest.")
]


class MachineGroup(TyperGroup):
    """Commands about one machine, whose name comes first; says so to whom leaves it out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # click's, or typer's own
        first, second = [*args, "", ""][:2]
        if first in self.commands and second not in self.commands:
            ctx.fail(f"the machine's name comes first: {ctx.command_path} NAME {first}.")
        return super().parse_args(ctx, args)


def ps(json: Json = False) -> None:
    """List your machines.

    Shows those that run, and those whose worker died without cleaning up.

    \b
    Examples:
      hvhost ps
      hvhost ps --json | jq -r '.[].name'
    """
    from hvhost.cli import output
    from hvhost.manager.control import machines

    listings = machines()
    if json:
        output.print_json(listings)
    else:
        output.print_machines(listings)


def info(name: Name, json: Json = False) -> None:
    """Show all a machine says of itself.

    Its state, heartbeat, bus, channels, and how often it left for the host and why.

    \b
    Examples:
      hvhost info demo
      hvhost info demo --json | jq .heartbeat
    """
    from hvhost.cli import output
    from hvhost.manager.client import MachineClient

    account = MachineClient(name).info()
    if json:
        output.print_json(account)
    else:
        output.print_info(account)


def console(
    name: Name,
    port: Annotated[
        int, typer.Option(metavar="N", min=1, max=2, help="Serial port; 1 is the console.")
    ] = 1,
) -> None:
    """Connect this terminal to a machine's console.

    Ctrl-] leaves it, and the machine runs on. Shows the last 64 KiB first. When the input is not
    a terminal it is piped into the console.

    \b
    Examples:
      hvhost console demo
      hvhost console demo < /dev/null > demo.log
    """
    from hvhost.manager import terminal
    from hvhost.manager.directory import running_directory

    terminal.attach(running_directory(name).serial_socket(port), 0, 1)


def stop(
    name: Name,
    force: Annotated[bool, typer.Option("--force", help="Power off without asking.")] = False,
    timeout: Timeout = 60.0,
) -> None:
    """Shut a machine down and wait until it is off.

    The guest shuts itself down, asked through its shutdown service.

    \b
    Examples:
      hvhost stop demo
      hvhost stop demo --timeout 300
      hvhost stop --force demo
    """
    from hvhost.manager import control

    control.stop(name, force=force, timeout=timeout)


def restart(
    name: Name,
    force: Annotated[bool, typer.Option("--force", help="Reset without asking.")] = False,
    timeout: Timeout = 60.0,
) -> None:
    """Reboot a machine and wait until it boots again.

    The guest reboots itself, asked through its shutdown service.

    \b
    Examples:
      hvhost restart demo
      hvhost restart --force demo
    """
    from hvhost.manager import control

    control.restart(name, force=force, timeout=timeout)


def pause(name: Name) -> None:
    """Have a machine stand still until it is resumed.

    No virtual processor runs and the guest's clock stops with them; its memory, open connections
    and copies under way stay as they are.

    \b
    Examples:
      hvhost pause demo
      hvhost info demo --json | jq .heartbeat
    """
    from hvhost.manager.client import MachineClient

    MachineClient(name).pause()


def resume(name: Name) -> None:
    """Let a paused machine go on.

    The guest finds no hole in its own time, and is told at once what time it is now.

    \b
    Example:
      hvhost resume demo
    """
    from hvhost.manager.client import MachineClient

    MachineClient(name).resume()


def nmi(name: Name) -> None:
    """Send a hung guest a non-maskable interrupt.

    It makes the guest panic, and dump where kdump is set up. The guest's kernel acts on it only
    with unknown_nmi_panic=1 on its command line (or in /proc/sys/kernel).

    \b
    Example:
      hvhost nmi demo
    """
    from hvhost.manager.client import MachineClient

    MachineClient(name).nmi()


def rm(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Names of stopped machines.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", "-a", help="All machines that do not run.")
    ] = False,
) -> None:
    """Delete what stopped machines have left: their logs.

    A machine from `hvhost run --detach` leaves its log behind, and so does one whose worker died.
    Disks and other files of yours are not touched. Prints the names.

    \b
    Examples:
      hvhost rm demo
      hvhost rm --all
    """
    from hvhost.errors import HvHostError
    from hvhost.manager import control

    if every is bool(names):
        raise HvHostError("name the machines to remove, or say --all.")
    if every:
        removed = control.remove_stopped()
    else:
        removed = list(dict.fromkeys(names or ()))
        for name in removed:
            control.remove(name)
    for name in removed:
        typer.echo(name)
