"""The ``hvhost`` command with all its commands.

Nothing here or in the command modules imports more than typer and the choices of
:mod:`hvhost.machine.kinds` until a command runs: ``hvhost --help`` and completion stay quick. For
the same reason the modules of commands do without ``from __future__ import annotations``: typer
compiles and evaluates an annotation that is a string four times.
"""

from typing import Annotated

import typer

from hvhost.cli import (
    backup,
    disk,
    doctor,
    drive,
    guest,
    kvp,
    machines,
    memory,
    net,
    rig,
    run,
    services,
    time,
    verify,
    version,
)

HELP = """A Hyper-V host for Linux guests, on any x86-64 Linux computer.

\b
Prove what a kernel can do on Hyper-V:
  hvhost verify --deb linux-image-6.12.deb
Boot one and look around:
  hvhost run --name demo --kernel vmlinuz --initrd initrd.img --append quiet
  hvhost info demo
  hvhost stop demo
See what this computer can do, and how to teach it the rest:
  hvhost doctor
"""

app = typer.Typer(
    name="hvhost",
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(wanted: bool) -> None:
    if wanted:
        from hvhost.version import say_version

        say_version()
        raise typer.Exit


@app.callback()
def _hvhost(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_say_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None: ...


app.command()(verify.verify)
app.command()(run.run)
app.command()(machines.ps)
app.command()(machines.info)
app.command()(machines.console)
app.command()(machines.stop)
app.command()(machines.restart)
app.command()(machines.pause)
app.command()(machines.resume)
app.command()(machines.nmi)
app.command()(machines.rm)
# What stands behind the machine's name is the command's, options too.
app.command("exec", context_settings={"allow_interspersed_args": False})(services.execute)
app.command()(services.copy)
app.command()(services.services)
app.add_typer(time.app, name="time")
app.add_typer(kvp.app, name="kvp")
app.command()(memory.memory)
app.command()(backup.backup)
app.add_typer(guest.app, name="guest")
app.add_typer(disk.app, name="disk")
app.add_typer(drive.app, name="drive")
app.add_typer(net.app, name="net")
app.command()(doctor.doctor)
app.add_typer(rig.app, name="rig")
app.command()(version.version)
