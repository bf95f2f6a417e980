"""``hvhost drive``: the disks and DVD drives of a running machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hvhost.cli.machines import Json, MachineGroup, Name

if TYPE_CHECKING:
    from hvhost.machine.storage_model import DriveInfo
    from hvhost.manager.storage import DriveClient

app = typer.Typer(cls=MachineGroup, no_args_is_help=True, rich_markup_mode=None)

Address = Annotated[
    str, typer.Argument(metavar="ADDRESS", help="Controller and LUN, like scsi0:1.")
]


@app.callback()
def machine(context: typer.Context, name: Name) -> None:
    """Drives of a running machine: list, add, remove, resize, insert.

    A drive is named by its place: scsi0:1 is LUN 1 of the first SCSI controller. Controllers have
    64 places; one that is not there yet comes into being with its first drive.

    \b
    Examples:
      hvhost drive demo list
      hvhost drive demo add data.vhdx
      hvhost drive demo add data.img --option controller=scsi1 --option readonly
      hvhost drive demo resize scsi0:0 20G
      hvhost drive demo remove scsi0:0
    """
    context.obj = name


def _client(context: typer.Context) -> "DriveClient":
    from hvhost.manager.client import MachineClient
    from hvhost.manager.storage import DriveClient

    return DriveClient(MachineClient(context.obj))


def _show(drives: "list[DriveInfo]", json: bool) -> None:
    from hvhost.cli import output
    from hvhost.units import format_size

    if json:
        output.print_json(drives)
        return
    rows = output.table("ADDRESS", "KIND", "SIZE", "ON THE HOST", "LIMITS", "WWN", "FILE")
    for each in drives:
        limits = [f"{each.iops} requests/s"] if each.iops else []
        limits += [f"{format_size(each.bandwidth)}/s"] if each.bandwidth else []
        notes = ["read-only"] if each.read_only and each.kind == "disk" else []
        notes += ["waits for room on the host"] if each.waiting else []
        file = output.plain(each.path or "empty")
        rows.add_row(
            each.address,
            each.kind.value,
            format_size(each.size) if each.path else "",
            format_size(each.allocated) if each.path else "",
            ", ".join(limits),
            each.wwn,
            file + (f" ({', '.join(notes)})" if notes else ""),
        )
    output.print_renderable(rows)


@app.command("list")
def list_drives(context: typer.Context, json: Json = False) -> None:
    """List the machine's drives.

    \b
    Examples:
      hvhost drive demo list
      hvhost drive demo list --json | jq -r '.[].path'
    """
    _show(_client(context).list(), json)


@app.command()
def add(
    context: typer.Context,
    file: Annotated[
        str | None, typer.Argument(metavar="FILE", help="Image, or block device, of the disk.")
    ] = None,
    dvd: Annotated[
        bool, typer.Option("--dvd", help="A DVD drive: FILE is an ISO image, or not given.")
    ] = False,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY[=VALUE]",
            help="controller=scsi0, lun=N, readonly, temporary, iops=N, bandwidth=SIZE (a second),"
            " format=raw (where the name does not say it), full=pause (when the host is full,"
            " writes wait).",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Attach a disk or a DVD drive; the guest finds it at once.

    \b
    Examples:
      hvhost drive demo add data.vhdx
      hvhost drive demo add data.img --option lun=5 --option iops=500
      hvhost drive demo add --dvd debian.iso
    """
    from hvhost.machine.storage_model import DriveKind
    from hvhost.manager.storage import parse_drive

    text = ",".join([file or "", *(option or ())])
    drive = parse_drive(text, DriveKind.DVD if dvd else DriveKind.DISK)
    _show([_client(context).add(drive)], json)


@app.command()
def remove(context: typer.Context, address: Address) -> None:
    """Detach a drive; what the guest wrote to it is in its file when this returns.

    The guest is not asked: unmount its file systems first.

    \b
    Example:
      hvhost drive demo remove scsi0:1
    """
    _client(context).remove(address)


@app.command()
def insert(
    context: typer.Context,
    address: Address,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="ISO image.")],
) -> None:
    """Put an image into a DVD drive, in place of the one that is in it.

    \b
    Example:
      hvhost drive demo insert scsi0:1 debian.iso
    """
    _client(context).insert(address, file)


@app.command()
def eject(
    context: typer.Context,
    address: Address,
    force: Annotated[
        bool, typer.Option("--force", help="Also while the guest holds the medium.")
    ] = False,
) -> None:
    """Take the image out of a DVD drive.

    \b
    Examples:
      hvhost drive demo eject scsi0:1
      hvhost drive demo eject scsi0:1 --force
    """
    _client(context).eject(address, force=force)


@app.command()
def resize(
    context: typer.Context,
    address: Address,
    size: Annotated[str, typer.Argument(metavar="SIZE", help="The disk's new size, like 20G.")],
    shrink: Annotated[
        bool, typer.Option("--shrink", help="Allow a smaller size, down to the last partition.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="With --shrink: cut partitions off, and lose what is there."),
    ] = False,
    json: Json = False,
) -> None:
    """Set a disk's size; the guest sees it without a restart.

    Partitions and file systems stay as they are: grow them in the guest.

    \b
    Example:
      hvhost drive demo resize scsi0:0 20G
    """
    from hvhost.units import parse_size

    _show([_client(context).resize(address, parse_size(size), shrink=shrink, force=force)], json)


@app.command()
def limit(
    context: typer.Context,
    address: Address,
    iops: Annotated[
        int, typer.Option(metavar="N", min=0, help="Requests a second; 0 is no limit.")
    ] = 0,
    bandwidth: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes a second, like 50M.")
    ] = None,
    json: Json = False,
) -> None:
    """Limit what a drive may do in a second; without options, lift its limits.

    \b
    Examples:
      hvhost drive demo limit scsi0:0 --iops 500 --bandwidth 50M
      hvhost drive demo limit scsi0:0
    """
    from hvhost.units import parse_size

    rate = parse_size(bandwidth, what="bandwidth") if bandwidth else 0
    _show([_client(context).limit(address, iops=iops, bandwidth=rate)], json)
