"""``hvhost backup``: the disks of a running machine, copied in a consistent state."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hvhost.cli.machines import Json, Name

if TYPE_CHECKING:
    from hvhost.machine.backup_model import BackupInfo


def backup(
    name: Name,
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIRECTORY", help="Where the backup's own directory is made."),
    ],
    incremental: Annotated[
        bool,
        typer.Option(
            "--incremental",
            help="Store only what is different from the newest backup there, which stays needed.",
        ),
    ] = False,
    crash_consistent: Annotated[
        bool,
        typer.Option(
            "--crash-consistent",
            help="Do not ask the guest: the disks are as after a loss of power.",
        ),
    ] = False,
    allow_same_volume: Annotated[
        bool,
        typer.Option(
            "--allow-same-volume",
            help="Even if DIRECTORY is on the file system of a disk, and is lost with it.",
        ),
    ] = False,
    allow_network: Annotated[
        bool,
        typer.Option(
            "--allow-network",
            help="Even if a disk is on network storage, where others may change it.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Back up all disks of a machine while it runs.

    The guest freezes its file systems for a moment (its hv_vss_daemon does, package
    hyperv-daemons), so that they are whole in the backup; then it goes on, and the disks are
    copied as they were in that moment. Makes DIRECTORY/NAME-TIME with a VHDX for each disk and
    backup.json, which says what is what. Ctrl-C gives the backup up and leaves nothing of it.

    \b
    Examples:
      hvhost backup demo /mnt/backups
      hvhost backup demo /mnt/backups --incremental
      hvhost backup demo /mnt/backups --crash-consistent
      hvhost backup demo /mnt/backups --json | jq -r .path
    """
    from hvhost.cli import output
    from hvhost.machine.backup_model import BackupOptions
    from hvhost.manager.backup import back_up
    from hvhost.manager.client import MachineClient

    options = BackupOptions(
        str(directory),
        crash_consistent=crash_consistent,
        allow_network=allow_network,
        allow_same_volume=allow_same_volume,
        incremental=incremental,
    )
    client = MachineClient(name)
    with output.byte_progress(name) as update:
        done = back_up(client, options, lambda info: update(info.copied, info.size))
    if json:
        output.print_json(done)
    else:
        _show(done, incremental=incremental)


def _show(done: "BackupInfo", *, incremental: bool) -> None:
    import sys

    from hvhost.machine.backup_model import Consistency
    from hvhost.units import format_size

    state = "crash-consistent, the guest was not asked"
    if done.consistency is Consistency.FILE_SYSTEM:
        state = f"file systems frozen for {done.frozen_seconds:.1f} s"
    print(
        f"Backed {format_size(done.size)} up to {done.path} in {done.seconds:.1f} s: {state}; "
        f"commands to the disks were held for {done.pause_seconds * 1000:.1f} ms at most."
    )
    if done.base is not None:
        print(f"{format_size(done.stored)} were different from {done.base}, which it needs.")
    elif incremental:
        print("There was no earlier backup of these disks, so this one is complete by itself.")
    if done.warning is not None:
        print(f"hvhost: warning: {done.warning}", file=sys.stderr)
