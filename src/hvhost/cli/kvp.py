"""``hvhost kvp``: key-value pairs between host and guest."""

from typing import Annotated

import typer

from hvhost.cli.machines import Json, MachineGroup, Name
from hvhost.machine.kinds import KvpPool

app = typer.Typer(cls=MachineGroup, no_args_is_help=True, rich_markup_mode=None)

Key = Annotated[str, typer.Argument(metavar="KEY", help="Name of the item.")]
AnyPool = Annotated[
    KvpPool | None, typer.Option("--pool", help="Only this pool; all of them otherwise.")
]
OnePool = Annotated[KvpPool, typer.Option("--pool", help="The pool the item is in.")]


@app.callback()
def machine(context: typer.Context, name: Name) -> None:
    """Exchange key-value pairs with a machine's guest.

    Pools: external (0) holds what you give the guest; guest (1) what programs of the guest tell the
    host; auto (2) what the guest's daemon says of its system; auto-external (3) what the host says
    of itself; auto-internal (4) what the guest keeps for itself. In a Linux guest each is a file,
    /var/lib/hyperv/.kvp_pool_0 to 4, but for auto.

    \b
    Examples:
      hvhost kvp demo list
      hvhost kvp demo set role web
      hvhost kvp demo get OSName --pool auto
    """
    context.obj = name


@app.command("list")
def list_items(context: typer.Context, pool: AnyPool = None, json: Json = False) -> None:
    """List the guest's items.

    \b
    Examples:
      hvhost kvp demo list
      hvhost kvp demo list --pool auto --json | jq -r '.[] | .key + "=" + .value'
    """
    from hvhost.cli import output
    from hvhost.manager.client import MachineClient

    records = MachineClient(context.obj).kvp_list(pool)
    if json:
        output.print_json(records)
        return
    rows = output.table("POOL", "KEY", "VALUE")
    for record in records:
        rows.add_row(record.pool.value, output.plain(record.key), output.plain(record.value))
    output.print_renderable(rows)


@app.command()
def get(context: typer.Context, key: Key, pool: AnyPool = None, json: Json = False) -> None:
    """Print the value of one item.

    \b
    Examples:
      hvhost kvp demo get OSName
      hvhost kvp demo get role --pool external
    """
    from hvhost.cli import output
    from hvhost.manager.client import MachineClient

    record = MachineClient(context.obj).kvp_get(key, pool)
    if json:
        output.print_json(record)
    else:
        print(record.value)


@app.command("set")
def set_item(
    context: typer.Context,
    key: Key,
    value: Annotated[str, typer.Argument(metavar="VALUE", help="Its text.")],
    pool: OnePool = KvpPool.EXTERNAL,
) -> None:
    """Give the guest an item, or change it.

    Items of the pools external and auto-external are given again whenever the guest boots, for as
    long as the machine runs.

    \b
    Example:
      hvhost kvp demo set role web
    """
    from hvhost.manager.client import MachineClient

    MachineClient(context.obj).kvp_set(key, value, pool)


@app.command()
def delete(context: typer.Context, key: Key, pool: OnePool = KvpPool.EXTERNAL) -> None:
    """Remove an item.

    \b
    Example:
      hvhost kvp demo delete role
    """
    from hvhost.manager.client import MachineClient

    MachineClient(context.obj).kvp_delete(key, pool)
