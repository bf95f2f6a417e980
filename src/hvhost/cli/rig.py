"""``hvhost rig``: the KVM host in software."""

from typing import Annotated

import typer

app = typer.Typer(
    name="rig",
    help="The KVM host in software that hvhost uses without hardware virtualization.",
    short_help="The KVM host in software.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def status(
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Say whether a rig runs, since when, and for which machines."""
    from hvhost.cli import output
    from hvhost.rig.client import status as rig_status

    account = rig_status()
    if json:
        output.print_json(account)
    else:
        output.print_fields(account)


@app.command(name="exec", context_settings={"ignore_unknown_options": True})
def execute(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND…", help="After --.")],
) -> None:
    """Run a command inside a software KVM host, where /dev/kvm is real.

    It sees this computer's files: it may change them, but the changes are gone with it. The exit
    status is the command's.

    \b
    Examples:
      hvhost rig exec -- hvhost doctor
      hvhost rig exec -- qemu-system-x86_64 -accel kvm -nographic -kernel vmlinuz
    """
    from hvhost.rig.execute import execute as rig_execute

    raise typer.Exit(rig_execute(command))
