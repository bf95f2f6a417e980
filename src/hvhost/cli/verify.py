"""``hvhost verify``."""

from pathlib import Path
from typing import Annotated

import typer

from hvhost.machine.kinds import Transport


def verify(
    guest: Annotated[
        str | None,
        typer.Option(metavar="GUEST", help="A known distribution's kernel, like debian-12."),
    ] = None,
    kernel: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A kernel of your own: bzImage or vmlinux.")
    ] = None,
    modules: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="That kernel's modules: the directory in lib/modules."),
    ] = None,
    deb: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE…", help="Debian packages of a kernel of your own."),
    ] = None,
    more_debs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE…]", show_default=False, help="More packages after --deb."),
    ] = None,
    daemons: Annotated[
        str | None,
        typer.Option(metavar="GUEST", help="Take Hyper-V's daemons from this distribution."),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(metavar="ID,ID…", help="Only these rows of the contract, and demand them."),
    ] = None,
    cpus: Annotated[int, typer.Option(metavar="N", help="Virtual processors.")] = 2,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Memory, like 512M.")] = "512M",
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the results there as JSON.")
    ] = None,
    svg: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the table there, as a picture.")
    ] = None,
    keep_logs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep consoles and logs there.")
    ] = None,
    allow_lacks: Annotated[
        str,
        typer.Option(metavar="ID,ID…", help="Rows this kernel may lack the driver of."),
    ] = "",
    baseline: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="JSON of an earlier run: what it lacked then, it may lack now."
        ),
    ] = None,
    append: Annotated[
        str, typer.Option(metavar="TEXT", help="More words for the guest's kernel command line.")
    ] = "",
    kvm: Annotated[
        Transport, typer.Option(help="What runs the virtual processors; auto takes what works.")
    ] = Transport.AUTO,
) -> None:
    """Prove what works in a kernel on Hyper-V.

    Boots it as a guest, exercises each feature, and prints a table with the
    evidence seen for every row. The exit status is 0 only if every row
    works, or lacks a driver that it may lack. Without an option it verifies Debian 12's own
    cloud kernel.

    \b
    Examples:
      hvhost verify
      hvhost verify --deb linux-image-6.12.9-cloud-amd64.deb --json result.json
      hvhost verify --kernel bzImage --modules out/lib/modules/6.18.0
      hvhost verify --guest debian-13 --rows shutdown,heartbeat
    """
    from hvhost.units import parse_size
    from hvhost.verify.command import verify as run_verify
    from hvhost.verify.options import VerifyOptions

    named = _split(rows or "")
    # A variable that is not set must not make another verification of it.
    if rows is not None and not named:
        raise typer.BadParameter("--rows names no row; leave --rows out to have all of them.")
    if guest == "":
        raise typer.BadParameter("--guest names no guest; `hvhost guest list` shows what there is.")
    if sum(bool(choice) for choice in (guest, kernel, deb)) > 1:
        raise typer.BadParameter("give only one of --guest, --kernel and --deb.")
    if modules is not None and kernel is None:
        raise typer.BadParameter("--modules belongs to --kernel; give both.")
    if more_debs and not deb:
        raise typer.BadParameter(f"{more_debs[0]} belongs to no option; packages follow --deb.")
    status = run_verify(
        VerifyOptions(
            guest=guest,
            kernel=kernel,
            modules=modules,
            debs=[*(deb or []), *(more_debs or [])],
            daemons=daemons,
            rows=named,
            cpus=cpus,
            memory=parse_size(memory, what="memory"),
            json_path=json,
            svg_path=svg,
            keep_logs=keep_logs,
            allow_lacks=_split(allow_lacks),
            baseline=baseline,
            transport=kvm,
            append=append,
        )
    )
    raise typer.Exit(status)


def _split(text: str) -> list[str]:
    return [word for word in (part.strip() for part in text.split(",")) if word]
