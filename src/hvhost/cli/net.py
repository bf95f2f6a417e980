"""``hvhost net``: switches, and the network adapters of machines."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hvhost.cli.machines import Json, Name


class NetGroup(TyperGroup):
    """Takes ``NAME set-ip …`` as well as ``set-ip NAME …``: as people say it of a machine."""

    def resolve_command(self, context: Any, words: list[str]) -> Any:  # click's, or typer's own
        if len(words) > 1 and words[1] == "set-ip" and words[0] not in self.commands:
            words = [words[1], words[0], *words[2:]]
        return super().resolve_command(context, words)


app = typer.Typer(
    cls=NetGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Virtual switches, and the network adapters of machines.",
)
Switch = Annotated[str, typer.Argument(metavar="SWITCH", help="Name of the switch.")]
Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="Name of the adapter, like net0.")]


@app.command()
def create(
    switch: Switch,
    uplink: Annotated[
        str,
        typer.Option(
            metavar="PLUG",
            help="How the switch reaches further: nat, host-only, tap:NAME or none; after commas"
            " follow address=ADDRESS/LENGTH, its own, for nat and host-only, and vlan=, trunk=,"
            " isolated and rate=, as for any port.",
        ),
    ] = "nat",
    json: Json = False,
) -> None:
    """Make a virtual switch, into which machines of this computer can be plugged.

    It is a process of its own and lives until it is deleted. By nat, which needs the program passt
    and no rights, machines reach what this computer reaches; with none only each other.

    \b
    Examples:
      hvhost net create lan
      hvhost net create lan --uplink nat,address=10.9.8.1/24,forward=2222:22
      hvhost net create private --uplink none
      hvhost net create office --uplink tap:tap0,vlan=10
      hvhost run --guest debian-12 --nic switch:lan,vlan=10
    """
    from hvhost.cli import output
    from hvhost.errors import HvHostError
    from hvhost.network.config import Uplink, check_name, parse_uplink
    from hvhost.network.switch_client import SwitchConfig, info, start

    config = parse_uplink(uplink)
    try:
        start(SwitchConfig(check_name(switch), config))
    except HvHostError as error:
        if config is None or config.uplink is not Uplink.NAT or config.forwards:
            raise
        if "passt" not in str(error):
            raise
        raise HvHostError(
            f"{error} A switch whose machines reach only each other needs nothing: "
            f"`hvhost net create {switch} --uplink none`."
        ) from error
    if json:
        output.print_json(info(switch))


@app.command()
def delete(switch: Switch) -> None:
    """End a switch; adapters that were plugged into it lose their link."""
    from hvhost.network.switch_client import stop

    stop(switch)


@app.command("ls")
def list_switches(json: Json = False) -> None:
    """List the switches, their ports, and the addresses heard behind each port."""
    from hvhost.cli import output
    from hvhost.network.switch_client import survey

    found, silent = survey()
    if json:
        output.print_json(found)
    else:
        _print_switches(found)
    for sentence in silent:
        print(f"hvhost: {sentence}", file=sys.stderr)
    if silent:
        raise typer.Exit(1)


def _print_switches(found: list[dict[str, Any]]) -> None:
    from hvhost.cli import output

    rows = output.table("SWITCH", "PORT", "VLAN", "IN", "OUT", "DROPPED", "ADDRESSES")
    for each in found:
        leases = each["leases"]
        for port in each["ports"]:
            heard = [
                f"{mac} = {leases[mac]}" if mac in leases else mac for mac in port["addresses"]
            ]
            rows.add_row(
                each["name"],
                output.plain(port["name"]) + (f" ({each['uplink']})" if _is_uplink(port) else ""),
                _vlans(port),
                *(str(port[what]) for what in ("received", "sent", "dropped")),
                "\n".join(heard),
            )
        if not each["ports"]:
            rows.add_row(each["name"], "none")
    output.print_renderable(rows)


def _is_uplink(port: dict[str, Any]) -> bool:
    return bool(port["name"] == "uplink")


def _vlans(port: dict[str, Any]) -> str:
    """A port's VLANs in a few words."""
    trunk, words = port["trunk"], []
    if port["vlan"]:
        words.append(str(port["vlan"]))
    if trunk:
        words.append(f"trunk of {len(trunk)}")
    elif _is_uplink(port) and not port["vlan"]:
        words.append("all")
    if port["isolated"]:
        words.append("isolated")
    return ", ".join(words)


@app.command()
def capture(
    switch: Switch,
    write: Annotated[
        Path, typer.Option("--write", "-w", metavar="FILE", help="Where to; - is the output.")
    ],
    port: Annotated[
        str, typer.Option(metavar="PORT", help="Only what comes in on this port.")
    ] = "",
) -> None:
    """Write what passes a switch into a pcap file, until Ctrl-C; Wireshark opens it.

    Frames are written as they come in, before their tags change. A checksum that is not made yet,
    and segments of 64 KiB, are what machines on one computer hand each other.

    \b
    Examples:
      hvhost net capture lan -w lan.pcap
      hvhost net capture lan -w - | tcpdump -r -
    """
    from hvhost.errors import HvHostError
    from hvhost.network import switch_client

    switch_client.check_port(switch, port)  # before a file is made, or emptied, for nothing
    try:
        with sys.stdout.buffer if str(write) == "-" else write.open("wb") as file:
            count = switch_client.capture(switch, port, file)
    except KeyboardInterrupt:
        return
    except BrokenPipeError:
        raise
    except OSError as error:
        raise HvHostError(
            f"the capture cannot be written to {str(write)!r}: {error.strerror}; name another file."
        ) from error
    print(f"hvhost: the switch ended; {count} frames were written.", file=sys.stderr)


@app.command()
def adapters(name: Name, json: Json = False) -> None:
    """List a machine's network adapters."""
    from hvhost.cli import output
    from hvhost.manager.client import MachineClient
    from hvhost.manager.network import NetworkClient

    found = NetworkClient(MachineClient(name)).adapters()
    if json:
        output.print_json(found)
        return
    columns = ("ADAPTER", "ADDRESS", "PLUG", "LINK", "GUEST", "CHANNELS", "MTU", "IN", "OUT")
    rows = output.table(*columns)
    for each in found:
        rows.add_row(
            each.name,
            each.current_mac,
            each.plug,
            "up" if each.link else "down",
            "uses it" if each.open else "does not use it",
            *map(str, (each.channels, each.mtu, each.received, each.transmitted)),
        )
    output.print_renderable(rows)


@app.command()
def add(
    name: Name,
    plug: Annotated[
        str, typer.Argument(metavar="PLUG", help="What it is plugged into, as `hvhost run --nic`.")
    ],
    adapter: Annotated[str, typer.Option("--name", metavar="ADAPTER", help="Its name.")] = "",
    json: Json = False,
) -> None:
    """Give a running machine another network adapter, and print its name.

    \b
    Examples:
      hvhost net add demo nat
      hvhost net add demo switch:lan,trunk=10+20-29 --name trunk0
    """
    from hvhost.cli import output
    from hvhost.manager.client import MachineClient
    from hvhost.manager.network import NetworkClient

    network = NetworkClient(MachineClient(name))
    taken = {each.name for each in network.adapters()}
    free = next(f"net{number}" for number in range(len(taken) + 1) if f"net{number}" not in taken)
    added = network.add(plug, adapter or free)
    if json:
        output.print_json(added)
    else:
        print(added.name)


@app.command()
def remove(name: Name, adapter: Adapter) -> None:
    """Take a network adapter away from a running machine."""
    from hvhost.manager.client import MachineClient
    from hvhost.manager.network import NetworkClient

    NetworkClient(MachineClient(name)).remove(adapter)


@app.command()
def link(
    name: Name,
    adapter: Adapter,
    state: Annotated[str, typer.Argument(metavar="up|down", help="Plugged in, or pulled.")],
    json: Json = False,
) -> None:
    """Pull an adapter's cable, or plug it in again; the guest notices at once.

    \b
    Examples:
      hvhost net link demo net0 down
      hvhost net link demo net0 up
    """
    from hvhost.cli import output
    from hvhost.manager.client import MachineClient
    from hvhost.manager.network import NetworkClient

    if state not in ("up", "down"):
        raise typer.BadParameter("say up or down.")
    changed = NetworkClient(MachineClient(name)).set_link(adapter, state == "up")
    if json:
        output.print_json(changed)


@app.command("set-ip")
def set_ip(
    name: Name,
    adapter: Adapter,
    addresses: Annotated[
        list[str],
        typer.Argument(
            metavar="ADDRESS/LENGTH…|dhcp", help="IPv4 and IPv6 addresses, or dhcp to ask for them."
        ),
    ],
    gateway: Annotated[
        list[str] | None,
        typer.Option(metavar="ADDRESS", help="Default gateway; once for IPv4, once for IPv6."),
    ] = None,
    dns: Annotated[
        list[str] | None, typer.Option(metavar="ADDRESS", help="Name server; may be repeated.")
    ] = None,
) -> None:
    """Set an adapter's addresses in the guest, without any network to reach it by.

    The guest's own hv_kvp_daemon does it, through its script hv_set_ifconfig. Debian ships none;
    our complete guests have one (docs/guests.md).

    \b
    Examples:
      hvhost net set-ip demo net0 192.0.2.5/24 --gateway 192.0.2.1 --dns 192.0.2.53
      hvhost net set-ip demo net0 192.0.2.5/24 2001:db8::5/64 --gateway 2001:db8::1
      hvhost net set-ip demo net0 dhcp
    """
    from hvhost.manager.client import MachineClient
    from hvhost.manager.network import NetworkClient
    from hvhost.network.addresses import parse

    wanted = parse(addresses, gateway or (), dns or ())
    NetworkClient(MachineClient(name)).set_ip(adapter, wanted)
