"""``hvhost run``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hvhost.cli.progress import say
from hvhost.machine.kinds import Transport

if TYPE_CHECKING:
    from hvhost.network.config import AdapterConfig


def run(
    kernel: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Kernel to boot: a bzImage, a vmlinux or a PVH ELF."),
    ] = None,
    guest: Annotated[
        str | None,
        typer.Option(
            metavar="GUEST",
            help="Boot a known distribution's kernel with a small root of ours, like debian-12,"
            " or a complete system, like debian-12-full; `hvhost guest list` knows them all.",
        ),
    ] = None,
    initrd: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Initial RAM disk (initramfs).")
    ] = None,
    append: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="Kernel command line; console=ttyS0 is added unless it names a console.",
        ),
    ] = "",
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the machine; made up when not given."),
    ] = None,
    cpus: Annotated[int, typer.Option(metavar="N", help="Virtual processors.")] = 1,
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory, like 512M or 2G; a bare number is MiB.")
    ] = "512M",
    memory_minimum: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Makes memory dynamic: the least the guest may have."),
    ] = None,
    memory_maximum: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Makes memory dynamic: the most the guest may have."),
    ] = None,
    memory_buffer: Annotated[
        int | None,
        typer.Option(metavar="PERCENT", help="Dynamic memory beyond the demand; 20 % by default."),
    ] = None,
    memory_weight: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Share of dynamic memory when it is scarce: 1 to 10000, 5000."
        ),
    ] = None,
    mmio_low: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="MMIO gap below 4 GiB, where no memory is; 128M."),
    ] = None,
    mmio_high: Annotated[
        str | None, typer.Option(metavar="SIZE", help="MMIO window above all memory; 512M.")
    ] = None,
    disk: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[,OPTION…]",
            help="A disk: an image or a block device. May be given several times; options:"
            " controller=scsi0, lun=N, readonly, temporary, iops=N, bandwidth=SIZE, format=raw,"
            " full=pause"
            " (see docs/storage.md).",
        ),
    ] = None,
    dvd: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="A DVD drive with an ISO image in it, or '' for none."),
    ] = None,
    fibre_channel: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PORT:NODE",
            help="A fibre channel adapter (fc0, fc1…) with these world-wide names, or auto.",
        ),
    ] = None,
    storage_process: Annotated[
        bool,
        typer.Option(
            "--storage-process",
            help="Serve the disks from a process of their own, confined and beside the machine's"
            " worker (see docs/storage.md).",
        ),
    ] = False,
    kvm: Annotated[
        Transport,
        typer.Option(
            help="What runs the virtual processors: this computer's /dev/kvm, or the rig, a KVM"
            " host in software; auto takes what really works."
        ),
    ] = Transport.AUTO,
    nic: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PLUG",
            help="A network adapter, plugged into nat, host-only, tap:NAME, switch:NAME or none;"
            " options follow after commas, like switch:lan,vlan=10 (see docs/network.md)."
            " May be given several times.",
        ),
    ] = None,
    publish: Annotated[
        list[str] | None,
        typer.Option(
            "--publish",
            "-p",
            metavar="HOST:GUEST",
            help="Lead a port of this computer into the guest, like 2222:22 or udp:5353:53;"
            " gives it an adapter on nat if it has none.",
        ),
    ] = None,
    detach: Annotated[
        bool,
        typer.Option("--detach", help="Return once the machine runs, and print its name."),
    ] = False,
) -> None:
    """Start a machine, with its console on this terminal.

    Ends when the guest powers off. Ctrl-] ends the machine at once. When the input is not a
    terminal it is simply piped into the console. With --detach the machine goes on without you:
    see `hvhost ps`, `hvhost console` and `hvhost stop`.

    \b
    Examples:
      hvhost run --guest debian-12
      hvhost run --guest debian-12-full --memory 1G
      hvhost run --kernel vmlinuz --initrd initrd.img --append "quiet root=/dev/sda1"
      hvhost run --name build --kernel vmlinuz --cpus 2 --memory 2G --detach
      hvhost run --guest debian-12 --disk data.vhdx --disk logs.img,lun=5,readonly
      hvhost run --guest debian-12 --nic nat -p 2222:22
      hvhost run --guest debian-12 --memory 1G --memory-minimum 512M --memory-maximum 4G
    """
    from hvhost.manager.definition import define, define_guest, dynamic_memory
    from hvhost.memory.settings import HIGH_MMIO_DEFAULT, LOW_MMIO_DEFAULT

    if (kernel is None) == (guest is None):
        raise typer.BadParameter("give exactly one of --kernel and --guest.")
    if guest is not None and initrd is not None:
        raise typer.BadParameter("--guest brings its own initrd; give --kernel with --initrd.")
    adapters: tuple[AdapterConfig, ...] = ()
    if nic or publish:
        from hvhost.network.config import parse_adapters

        adapters = parse_adapters(nic or [], publish or [])  # before a guest is fetched
    if disk or dvd or fibre_channel:
        from hvhost.manager.storage import check_storage

        check_storage(disk or (), dvd or (), fibre_channel or ())
    limits = dynamic_memory(
        memory,
        minimum=memory_minimum,
        maximum=memory_maximum,
        buffer=memory_buffer,
        weight=memory_weight,
    )
    low = LOW_MMIO_DEFAULT if mmio_low is None else mmio_low
    high = HIGH_MMIO_DEFAULT if mmio_high is None else mmio_high
    if kernel is not None:
        config = define(
            kernel=kernel,
            initrd=initrd,
            command_line=append,
            cpus=cpus,
            memory=memory,
            name=name,
            transport=kvm,
            dynamic_memory=limits,
            mmio_low=low,
            mmio_high=high,
        )
    else:
        from hvhost.guests.catalog import check_guest
        from hvhost.manager.launcher import check_shape

        assert guest is not None
        check_guest(guest, "give a kernel with --kernel")
        check_shape(
            define(
                kernel="",
                command_line=append,
                cpus=cpus,
                memory=memory,
                name=name,
                dynamic_memory=limits,
                mmio_low=low,
                mmio_high=high,
            )
        )
        config = define_guest(
            guest,
            command_line=append,
            cpus=cpus,
            memory=memory,
            name=name,
            transport=kvm,
            dynamic_memory=limits,
            mmio_low=low,
            mmio_high=high,
            progress=say,
        )
    if adapters:
        from dataclasses import replace

        config = replace(config, adapters=adapters)
    if disk or dvd or fibre_channel:
        from hvhost.manager.storage import with_storage

        config = with_storage(config, disk or (), dvd or (), fibre_channel or (), say)
    if storage_process:
        from dataclasses import replace

        config = replace(config, storage_process=True)
    if detach:
        from hvhost.manager.launcher import launch

        launch(config, detach=True, progress=say)
        print(config.name)
    else:
        from hvhost.manager import foreground

        foreground.run(config, progress=say)
