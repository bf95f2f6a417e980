"""The row ``static-ip`` with a namespace's kernel in the guest's place, and what it must notice.

hv_kvp_daemon and systemd-networkd are played; cable, kernels, pings, TCP and DHCP are real.
"""

from __future__ import annotations

import ipaddress
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from hvhost.errors import HvHostError
from hvhost.network import switch_client
from hvhost.network.addresses import Addresses
from hvhost.network.config import parse_adapter
from hvhost.network.namespace import Namespace, inside, open_namespace
from hvhost.network.report import AdapterInfo
from hvhost.network.switch_client import Hello, SwitchConfig
from hvhost.verify.guest import CommandResult, RowFailed
from hvhost.verify.rows import static_ip
from hvhost.verify.session import Timing
from hvhost.verify.wire import GUEST4

if TYPE_CHECKING:
    from hvhost.verify.session import Session

CLIENT = """
import socket, struct, subprocess, sys
hardware = bytes.fromhex(sys.argv[1].replace(":", ""))
head = struct.pack("!BBBBIHH", 1, 1, 6, 0, 99, 0, 0x8000) + bytes(16) + hardware
head = head.ljust(236, b"\\0") + bytes((99, 130, 83, 99))
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
sock.setsockopt(socket.SOL_SOCKET, 25, b"tap0")
sock.bind(("", 68))
sock.settimeout(20)
for kind in (1, 3):
    sock.sendto(head + bytes((53, 1, kind, 255)), ("255.255.255.255", 67))
    answer = sock.recv(2000)
print(socket.inet_ntoa(answer[16:20]))
"""


def keyfile_length(mask: str) -> int:
    """As ``hv_kvp_daemon`` reads it since Linux 6.8: what is no IPv4 mask by ``atoi()``."""
    if "." in mask:
        return ipaddress.ip_network(f"0.0.0.0/{mask}").prefixlen
    digits = re.match(r"\d*", mask)
    assert digits is not None
    return int(digits[0] or 0)


class Guest:
    """Probe, machine and network adapter; ``faults`` say what its daemon does wrong."""

    def __init__(self, directory: Path, *faults: str) -> None:
        self.faults, self.directory = set(faults), directory
        event = 3.0 if faults else 60.0
        self.timing = Timing(boot=2.0, event=event, poll=0.05, stretch=lambda: 1.0)
        self.machine = self.network = self
        self.namespace: Namespace | None = None
        self.servers: tuple[str, ...] = ()
        stubs = directory / "bin"
        stubs.mkdir()
        for name, text in (
            ("systemctl", "exit 0"),
            ("resolvectl", f'echo "Link 2 ($2): $(cat {directory}/dns)"'),
        ):
            (stubs / name).write_text(f"#!/bin/sh\n{text}\n")
            (stubs / name).chmod(0o755)

    def step(self, text: str) -> None: ...

    def running(self) -> Guest:
        return self

    def inside(self, *words: str) -> CommandResult:
        assert self.namespace is not None
        path = f"{self.directory / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(
            ["env", f"PATH={path}", *inside(self.namespace.pid, list(words))],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        return CommandResult(done.returncode, done.stdout + done.stderr)

    def run(self, command: Sequence[str], timeout: float) -> CommandResult:
        if command[0] == "systemctl":
            return CommandResult(0, "")
        script = command[-1].replace(static_ip.RESOLVER, f"{self.directory}/resolv.conf")
        return self.inside(*command[:-1], script)

    def read_all(self, *patterns: str) -> dict[str, str]:
        return {f"/sys/class/net/tap0/{patterns[0].rpartition('/')[2]}": self.mac}

    # The machine's network.

    def add(self, nic: str, name: str) -> AdapterInfo:
        config = parse_adapter(nic, name=name)
        self.mac = config.mac
        switch_client.start(SwitchConfig("cable", config))
        self.namespace = open_namespace([("tap0", "")])
        switch_client.attach("cable", Hello("tap", "guest"), self.namespace.descriptors[0])
        assert self.inside("ip", "link", "set", "tap0", "address", self.mac).status == 0
        pid = int(switch_client.info("cable")["namespace_pid"])
        values: dict[str, object] = dict.fromkeys(AdapterInfo.__dataclass_fields__, 0)
        values |= {"name": name, "mac": config.mac, "namespace_pid": pid}
        return AdapterInfo(**values)  # type: ignore[arg-type] # only these are looked at

    def remove(self, name: str) -> list[AdapterInfo]:
        switch_client.stop("cable")
        assert self.namespace is not None
        self.namespace.close()
        return []

    def set_ip(self, name: str, wanted: Addresses) -> AdapterInfo | None:
        settings = wanted.settings("2450ee40-33bf-4fbd-892e-9fb06e9214cf")
        if "refuses" in self.faults:
            raise HvHostError("The guest did not configure adapter {…}: its daemon failed.")
        self.inside("ip", "address", "flush", "dev", "tap0", "scope", "global")
        for family in ("-4", "-6"):
            self.inside("ip", family, "route", "flush", "default")
        addresses = wanted.addresses
        if "forgets-ipv6" in self.faults:
            addresses = tuple(each for each in addresses if ":" not in each)
        if "keeps-the-old" in self.faults and not wanted.gateways:
            addresses += (f"{GUEST4}/24",)
        for address in addresses:
            nodad = ("nodad",) if ":" in address else ()
            self.inside("ip", "address", "add", address, "dev", "tap0", *nodad)
        gateways = () if "forgets-gateways" in self.faults else wanted.gateways
        for gateway in gateways:
            self.inside("ip", "route", "add", "default", "via", gateway, "dev", "tap0")
        servers = () if "forgets-dns" in self.faults else wanted.dns_servers
        (self.directory / "dns").write_text(" ".join(servers))
        (self.directory / "resolv.conf").write_text("".join(f"nameserver {e}\n" for e in servers))
        four = next((each for each in wanted.addresses if ":" not in each), "")
        lines = [f"IPADDR0={four.partition('/')[0]}", "NETMASK0=255.255.255.0"]
        lines += [f"GATEWAY={each}" for each in wanted.gateways if ":" not in each]
        (self.directory / "ifcfg-tap0").write_text("\n".join(lines))
        subnets = settings.subnets
        if "told-masks" in self.faults:
            subnets = subnets.replace("64", "ffff:ffff:ffff:ffff::")
        entries = zip(settings.addresses.split(";"), subnets.split(";"), strict=True)
        text = "".join(f"address1={each}/{keyfile_length(mask)}\n" for each, mask in entries)
        (self.directory / "tap0.nmconnection").write_text(text)
        if settings.dhcp and "no-dhcp" not in self.faults:
            self.inside("ip", "route", "add", "default", "dev", "tap0")
            lease = self.inside(sys.executable, "-c", CLIENT, self.mac).output.strip()
            self.inside("ip", "route", "flush", "default")
            self.inside("ip", "address", "add", f"{lease}/24", "dev", "tap0")
        return None


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HVHOST_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(static_ip, "WISH", f"{tmp_path}/ifcfg-")
    monkeypatch.setattr(static_ip, "KEYFILE", f"{tmp_path}/{{}}.nmconnection")
    # This guest has done what it does when it has been told: the first look counts.
    monkeypatch.setattr(static_ip, "_SECONDS", 0.0)
    try:
        open_namespace([("tap0", "")]).close()
    except HvHostError as error:
        pytest.skip(str(error))
    return tmp_path


def prove(guest: Guest) -> list[str]:
    return list(static_ip.prove(cast("Session", guest)))


def test_a_guest_that_does_all_of_it(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_ip, "LINGER_SECONDS", 0.3)
    monkeypatch.setattr(static_ip, "PING_SECONDS", 0.5)
    evidence = "\n".join(prove(Guest(directory)))
    assert "IPADDR0=192.168.77.2" in evidence and "fd77::2/64" in evidence
    assert "for NetworkManager: address1=192.168.77.2/24, address1=fd77::2/64" in evidence
    assert "no longer at 192.168.77.2" in evidence
    assert "it leased 192.168.77.50" in evidence


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("refuses", "did not configure"),
        ("forgets-ipv6", "addresses are"),
        ("forgets-gateways", "gateways are"),
        ("forgets-dns", "name servers are"),
        ("keeps-the-old", "addresses are"),
        ("told-masks", "keyfile has no address=fd77::2/64"),
        ("no-dhcp", "dhcp"),
    ],
)
def test_a_guest_that_does_not(
    fault: str, sentence: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(static_ip, "DHCP_SECONDS", 0.2 if fault == "no-dhcp" else 20.0)
    monkeypatch.setattr(static_ip, "LINGER_SECONDS", 0.3)
    monkeypatch.setattr(static_ip, "PING_SECONDS", 0.5)
    with pytest.raises(HvHostError, match=sentence) as caught:
        prove(Guest(directory, fault))
    assert isinstance(caught.value, RowFailed) or fault == "refuses"
