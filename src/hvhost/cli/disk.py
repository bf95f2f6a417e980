"""``hvhost disk``: image files of disks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hvhost.storage.images import ImageFormat
    from hvhost.storage.operations import DiskInfo

app = typer.Typer(
    name="disk",
    help="""Make, check, resize, convert, merge and compact disk images.

    The name says the format: *.vhdx (recommended), *.vhd, *.img (raw). Images that a machine uses
    are left alone: it has them locked.

    \b
    Examples:
      hvhost disk create data.vhdx 100G
      hvhost disk convert debian.img debian.vhdx
    """,
    short_help="Disk images: create, check, resize, convert, merge, compact.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Image = Annotated[Path, typer.Argument(metavar="FILE", help="An image: *.vhdx, *.vhd or *.img.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Format = Annotated[
    str | None,
    typer.Option("--format", help="vhdx, vhd or raw, where the name does not say.", metavar="F"),
]
Fixed = Annotated[bool, typer.Option("--fixed", help="Take all the storage now, not as needed.")]
BlockSize = Annotated[
    str | None,
    typer.Option(help="Unit in which storage is taken: 1M to 256M; else 32M (VHD: 2M)."),
]
SectorSize = Annotated[int, typer.Option(help="Bytes of a sector for the guest: 512 or 4096.")]


@app.command()
def create(
    file: Image,
    size: Annotated[
        str | None, typer.Argument(metavar="[SIZE]", help="As in 100G; not with --parent.")
    ] = None,
    parent: Annotated[
        Path | None, typer.Option(help="Hold only the difference to this image.", metavar="FILE")
    ] = None,
    fixed: Fixed = False,
    block_size: BlockSize = None,
    sector_size: SectorSize = 512,
    json: Json = False,
) -> None:
    """Make a new, empty image.

    One with a parent begins as its copy and takes storage only for what becomes different; the
    parent must not change from then on.

    \b
    Examples:
      hvhost disk create data.vhdx 100G
      hvhost disk create --fixed --sector-size 4096 fast.vhdx 20G
      hvhost disk create --parent debian.vhdx test.vhdx
    """
    from hvhost.errors import HvHostError
    from hvhost.storage.operations import NewImage, create_differencing
    from hvhost.storage.operations import create as create_image
    from hvhost.units import parse_size

    if parent is not None:
        if size is not None or fixed or block_size is not None or sector_size != 512:
            raise HvHostError("an image with a parent has its size from there; name only --parent.")
        _print(create_differencing(file, parent), json=json)
    elif size is None:
        raise HvHostError(f"{file} needs a size, as in 100G, or a --parent.")
    else:
        new = NewImage(fixed, _bytes(block_size), sector_size)
        _print(create_image(file, parse_size(size), new), json=json)


@app.command()
def info(file: Image, image_format: Format = None, json: Json = False) -> None:
    """Say what an image holds, what storage it takes, and who uses it.

    \b
    Example:
      hvhost disk info data.vhdx
    """
    from hvhost.storage.operations import info as image_info

    _print(image_info(file, _format(image_format)), json=json)


@app.command()
def check(file: Image, image_format: Format = None, json: Json = False) -> None:
    """Look for damage in an image; the exit status is 1 if there is some.

    \b
    Example:
      hvhost disk check data.vhdx
    """
    from hvhost.cli import output
    from hvhost.storage.operations import check as check_image

    report = check_image(file, _format(image_format))
    if json:
        output.print_json(report)
    else:
        for note in report.notes:
            print(f"{file}: note: {note}.")
        for error in report.errors:
            print(f"{file}: damage: {error.removesuffix('.')}.")
        if report.clean:
            print(f"{file} is whole.")
    raise typer.Exit(0 if report.clean else 1)


@app.command()
def resize(
    file: Image,
    size: Annotated[str, typer.Argument(metavar="SIZE", help="As in 200G.")],
    force: Annotated[
        bool, typer.Option("--force", help="Cut off partitions that are in the way.")
    ] = False,
    image_format: Format = None,
    json: Json = False,
) -> None:
    """Grow or shrink an image that no machine uses.

    \b
    Example:
      hvhost disk resize data.vhdx 200G
    """
    from hvhost.storage.operations import resize as resize_image
    from hvhost.units import parse_size

    changed = resize_image(file, parse_size(size), image_format=_format(image_format), force=force)
    _print(changed, json=json)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="An image, or a block device.")],
    destination: Annotated[Path, typer.Argument(help="A new file; its name says the format.")],
    fixed: Fixed = False,
    block_size: BlockSize = None,
    image_format: Format = None,
    json: Json = False,
) -> None:
    """Copy a disk into a new image, of another format perhaps; parents are copied into it.

    A qcow2 or vmdk image can be copied where qemu-img is at hand.

    \b
    Examples:
      hvhost disk convert debian.img debian.vhdx
      hvhost disk convert debian.qcow2 debian.vhdx
    """
    from hvhost.cli import output
    from hvhost.storage.operations import NewImage
    from hvhost.storage.operations import convert as convert_image

    new = NewImage(fixed, _bytes(block_size))
    with output.byte_progress(f"Converting {source.name}") as progress:
        made = convert_image(source, destination, new, progress, image_format=_format(image_format))
    _print(made, json=json)


@app.command()
def merge(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An image with a parent.")],
    keep: Annotated[bool, typer.Option("--keep", help="Do not remove FILE afterwards.")] = False,
    json: Json = False,
) -> None:
    """Write an image into its parent, which becomes what the image was, and remove the image.

    If it is cut off, nothing is lost: run it again. Other images with that parent can no longer be
    used.

    \b
    Example:
      hvhost disk merge test.vhdx
    """
    from hvhost.cli import output
    from hvhost.storage.operations import merge as merge_image

    with output.byte_progress(f"Merging {file.name}") as progress:
        merged = merge_image(file, progress, keep=keep)
    _print(merged, json=json)


@app.command()
def compact(file: Image, image_format: Format = None, json: Json = False) -> None:
    """Make a VHDX file as short as what it holds.

    \b
    Example:
      hvhost disk compact data.vhdx
    """
    from hvhost.cli import output
    from hvhost.storage.operations import compact as compact_image

    with output.byte_progress(f"Compacting {file.name}") as progress:
        compacted = compact_image(file, progress, image_format=_format(image_format))
    _print(compacted, json=json)


def _format(name: str | None) -> "ImageFormat | None":
    from hvhost.errors import HvHostError
    from hvhost.storage.images import ImageFormat

    if name is None:
        return None
    try:
        return ImageFormat(name)
    except ValueError:
        raise HvHostError(f"{name} is no format of images; name vhdx, vhd or raw.") from None


def _bytes(size: str | None) -> int | None:
    from hvhost.units import parse_size

    return None if size is None else parse_size(size, what="block size")


def _print(info: "DiskInfo", *, json: bool) -> None:
    from hvhost.cli import output

    if json:
        output.print_json(info)
    else:
        output.print_disk(info)
