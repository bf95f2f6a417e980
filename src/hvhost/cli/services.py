"""Commands that use a guest's integration services: ``exec``, ``copy``, ``services``."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from hvhost.cli.machines import Json, Name


def execute(
    name: Name,
    command: Annotated[list[str], typer.Argument(metavar="COMMAND…", help="What to run.")],
) -> None:
    """Run a command in a guest that carries hvhost's probe.

    Its output and its exit status become this command's own; 128 and the signal's number for one
    that a signal ended. It gets no input. Guests made by hvhost (`hvhost run --guest`) carry the
    probe.

    \b
    Examples:
      hvhost exec demo uname -r
      hvhost exec demo -- sh -c 'dmesg | tail'
    """
    from hvhost.errors import HvHostError
    from hvhost.manager.client import MachineClient
    from hvhost.manager.probe import connect_probe

    def output(is_error: bool, data: bytes) -> None:
        stream = sys.stderr.buffer if is_error else sys.stdout.buffer
        stream.write(data)
        stream.flush()

    if command[0] == "--":
        del command[0]
        if not command:
            raise HvHostError("say what to run: hvhost exec NAME -- COMMAND.")
    probe = connect_probe(MachineClient(name).directory)
    try:
        status = probe.follow(command, output)
    finally:
        probe.close()
    sys.exit(status if status >= 0 else 128 - status)


def copy(
    name: Name,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="A file here.")
    ],
    destination: Annotated[
        str,
        typer.Argument(
            metavar="DEST", help="Absolute path in the guest; of a directory if it ends in /."
        ),
    ],
    create_path: Annotated[
        bool, typer.Option("--create-path", help="Make directories that are missing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that is there.")
    ] = False,
    json: Json = False,
) -> None:
    """Copy a file into a guest, without a network.

    Needs a Hyper-V file copy daemon in the guest (package hyperv-daemons), for which a guest that
    has just booted is given 10 s. Ctrl-C gives the copy up and leaves no half file. The file's mode
    in the guest is 0744, whatever it is here.

    \b
    Examples:
      hvhost copy demo disk.img /var/tmp/
      hvhost copy demo app.conf /etc/app/app.conf --create-path --overwrite
      hvhost copy demo disk.img /var/tmp/ --json | jq '.size / .seconds'
    """
    from hvhost.cli import output
    from hvhost.manager.client import MachineClient

    client = MachineClient(name)
    with output.copy_progress(file.name) as watch:
        done = client.copy(
            file, destination, create_path=create_path, overwrite=overwrite, watch=watch
        )
    if json:
        output.print_json(done)
    else:
        output.print_copied(done)


def services(
    name: Name,
    enable: Annotated[
        list[str] | None, typer.Option("--enable", metavar="SERVICE", help="Switch it on.")
    ] = None,
    disable: Annotated[
        list[str] | None, typer.Option("--disable", metavar="SERVICE", help="Switch it off.")
    ] = None,
    json: Json = False,
) -> None:
    """List a machine's services, or switch them on and off.

    They are heartbeat, shutdown, timesync, kvp, file-copy, vss (freezing file systems for a backup)
    and sockets. A service that is switched off disappears from the guest, whose driver lets go of
    it; it stays off when the guest restarts. Sockets that are off take no new connections; those
    there are go on.

    \b
    Examples:
      hvhost services demo
      hvhost services demo --disable timesync
      hvhost services demo --enable timesync --json
    """
    from hvhost.cli import output
    from hvhost.manager.client import MachineClient

    client = MachineClient(name)
    for each in disable or []:
        client.set_service(each, False)
    for each in enable or []:
        client.set_service(each, True)
    found = client.services()
    if json:
        output.print_json(found)
    else:
        output.print_services(found)
