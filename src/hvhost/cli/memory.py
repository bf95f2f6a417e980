"""``hvhost memory``: how much a machine has, and what it may have."""

from typing import Annotated

import typer

from hvhost.cli.machines import Json, Name


def memory(
    name: Name,
    change: Annotated[
        list[str] | None,
        typer.Argument(metavar="[set SIZE]", help="Set fixed memory to SIZE; whole MiB."),
    ] = None,
    minimum: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Dynamic memory: lower the least it may have."),
    ] = None,
    maximum: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Dynamic memory: raise the most it may have."),
    ] = None,
    buffer: Annotated[
        int | None,
        typer.Option(metavar="PERCENT", help="Only while the machine is stopped, see hvhost run."),
    ] = None,
    weight: Annotated[
        int | None,
        typer.Option(metavar="N", help="Only while the machine is stopped, see hvhost run."),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Draw assigned memory, demand and pressure over time.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.0, help="How long to wait for the guest.")
    ] = 60.0,
    json: Json = False,
) -> None:
    """Show a machine's memory, or change what it has or may have.

    Assigned is what the guest has now, demand what it needs, resident what this computer really
    holds for it. A machine started with --memory-minimum or --memory-maximum has dynamic memory:
    it sets itself between the two. The memory of others is fixed until you set it; less than the
    guest needs is refused with the numbers. A Linux guest uses what was added once it is online:
    have memhp_default_state=online on its command line, or a udev rule, in the guest.

    --watch draws every second until Ctrl-C: the pressure, demand in percent of assigned, is a bar
    of its own below, with ! for more than all. With --json it prints one object a line instead.

    \b
    Examples:
      hvhost memory demo
      hvhost memory demo set 3G
      hvhost memory demo --watch
      hvhost memory demo --minimum 256M --maximum 8G
    """
    from hvhost.cli import memory_output
    from hvhost.manager.client import MachineClient
    from hvhost.manager.memory import MemoryClient
    from hvhost.units import parse_size

    limits = any(each is not None for each in (minimum, maximum, buffer, weight))
    if change and (len(change) != 2 or change[0] != "set"):
        raise typer.BadParameter("write `set SIZE` to change the memory, or nothing to see it.")
    if change and limits:
        raise typer.BadParameter("a size is of fixed memory, limits are of dynamic memory.")
    client = MemoryClient(MachineClient(name))
    if change:
        info = client.set(parse_size(change[1]), timeout)
    elif limits:
        info = client.change(
            minimum=None if minimum is None else parse_size(minimum, what="--minimum"),
            maximum=None if maximum is None else parse_size(maximum, what="--maximum"),
            buffer=buffer,
            weight=weight,
        )
    else:
        info = client.info()
    if watch:
        memory_output.watch(name, client.info, json=json)
    else:
        memory_output.show(info, json=json)
