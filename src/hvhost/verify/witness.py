"""What happens inside a host-only namespace: ``python -m hvhost.verify.witness ACTION JSON``.

Run by ``nsenter`` in the network namespace at the other end of a guest's cable, it uses nothing but
that kernel's own sockets, and prints what it saw as JSON. A line ``ready`` before that says that
somebody may send now.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import random
import select
import socket
import struct
import sys
import time
from collections import Counter
from typing import Any

IP_MTU_DISCOVER, IP_PMTUDISC_DO = 10, 2
IPV6_MTU_DISCOVER, IPV6_DONTFRAG = 23, 62
SOL_PACKET, PACKET_AUXDATA = 263, 8
ETH_P_ALL = 0x0003
PACKET_OUTGOING = 4
TP_STATUS_CSUMNOTREADY, TP_STATUS_VLAN_VALID = 1 << 3, 1 << 4
_SIOCETHTOOL, _ETHTOOL_STXCSUM = 0x8946, 0x17
_AUXDATA = struct.Struct("=IIIHHHH")
_CHUNK = 1 << 18
_DHCP_OPTIONS = 240  # where they begin, behind the magic cookie
_DHCP_PAD, _DHCP_END = 0, 255
_DHCP_DISCOVER, _DHCP_REQUEST = b"\1", b"\3"


def test_data(size: int, seed: int) -> bytes:
    """*size* bytes that both ends can make."""
    return random.Random(seed).randbytes(size)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _sum(data: bytes) -> int:
    data += bytes(len(data) & 1)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ping(to: str, size: int = 56, count: int = 1, timeout: float = 5.0) -> dict[str, Any]:
    """Echo requests of *size* bytes that must not be fragmented; how many answers were right."""
    family = _family(to)
    if family == socket.AF_INET6:
        sock = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, IP_PMTUDISC_DO)
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_DONTFRAG, 1)
        request, reply, skip = 128, 129, 0
    else:
        sock = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
        request, reply, skip = 8, 0, 20
    identifier = random.randrange(1, 65535)
    answers, seconds = 0, []
    with sock:
        for number in range(count):
            data = test_data(size, number)
            packet = struct.pack("!BBHHH", request, 0, 0, identifier, number) + data
            if family == socket.AF_INET:
                packet = packet[:2] + struct.pack("!H", _sum(packet)) + packet[4:]
            started = time.perf_counter()
            sock.sendto(packet, (to, 0))
            while (left := started + timeout - time.perf_counter()) > 0:
                if not select.select([sock], [], [], left)[0]:
                    break
                answer = sock.recv(70_000)[skip:]
                if answer[0] == reply and answer[4:8] == packet[4:8]:
                    if answer[8:] == data:
                        answers += 1
                        seconds.append(time.perf_counter() - started)
                    break
    return {"sent": count, "answers": answers, "seconds": seconds}


def sink(address: str, port: int, timeout: float = 60.0) -> dict[str, Any]:
    """Take one TCP connection and read it to its end."""
    listener = socket.create_server((address, port), family=_family(address))
    listener.settimeout(timeout)
    print("ready", flush=True)
    stream, peer = listener.accept()
    stream.settimeout(timeout)
    digest, size, started = hashlib.sha256(), 0, time.perf_counter()
    while data := stream.recv(_CHUNK):
        digest.update(data)
        size += len(data)
    return {
        "size": size,
        "sha256": digest.hexdigest(),
        "seconds": time.perf_counter() - started,
        "peer": peer[0],
    }


def source(to: str, port: int, size: int, seed: int = 1, timeout: float = 60.0) -> dict[str, Any]:
    """Connect, send *size* bytes, and wait until the other side has closed."""
    data = test_data(size, seed)
    deadline = time.monotonic() + timeout
    while True:
        try:
            stream = socket.create_connection((to, port), timeout=timeout)
            break
        except ConnectionRefusedError:  # it does not listen yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    started = time.perf_counter()
    with stream:
        stream.sendall(data)
        stream.shutdown(socket.SHUT_WR)
        stream.recv(1)
    return {
        "size": size,
        "sha256": hashlib.sha256(data).hexdigest(),
        "seconds": time.perf_counter() - started,
    }


def knock(to: str, port: int, ports: list[int], timeout: float = 5.0) -> dict[str, Any]:
    """Try a TCP connection from each of *ports* to a port where nobody listens; how many refused.

    Each is one frame to the other side, and one back.
    """
    refused = 0
    for number in ports:
        with socket.socket(_family(to), socket.SOCK_STREAM) as stream:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            stream.settimeout(timeout)
            stream.bind(("", number))
            try:
                stream.connect((to, port))
            except ConnectionRefusedError:
                refused += 1
            except OSError:
                pass
    return {"refused": refused}


def inject(interface: str, frame: str, count: int = 1) -> dict[str, Any]:
    """Send a frame, given in hexadecimal digits, as it is, *count* times; bytes sent."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind((interface, 0))
        return {"sent": sum(sock.send(bytes.fromhex(frame)) for _ in range(count))}


def offload(interface: str, on: bool) -> dict[str, Any]:
    """Have the kernel leave checksums, and with them segmentation, to *interface*, or not."""
    value = ctypes.create_string_buffer(struct.pack("=II", _ETHTOOL_STXCSUM, on))
    request = struct.pack("16sP", interface.encode(), ctypes.addressof(value)).ljust(40, b"\0")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCETHTOOL, request)
    return {"on": on}


def watch(interface: str, seconds: float, sender: str = "") -> dict[str, Any]:
    """What arrives on *interface*, from *sender* if given, as an AF_PACKET socket sees it.

    Sizes without the Ethernet header; ``csum_not_ready`` counts frames whose checksum the sender
    left to whoever needs it; tags as the VLANs heard, with how often, and the priorities of each.
    """
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    sock.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    sock.bind((interface, ETH_P_ALL))
    print("ready", flush=True)
    frames = large = unready = fragments = 0
    largest = 0
    tags: Counter[int] = Counter()
    priorities: dict[int, set[int]] = {}
    deadline = time.monotonic() + seconds
    with sock:
        while (left := deadline - time.monotonic()) > 0:
            select.select([sock, sys.stdin], [], [], left)
            if not select.select([sock], [], [], 0)[0]:
                break  # the time is over, or the input was closed: enough
            data, auxiliary, _, address = sock.recvmsg(128, 128, socket.MSG_TRUNC)
            if address[2] == PACKET_OUTGOING or sender not in ("", data[6:12].hex(":")):
                continue
            frames += 1
            size = 0
            for level, kind, content in auxiliary:
                if (level, kind) == (SOL_PACKET, PACKET_AUXDATA):
                    status, size, _, _, _, tag, _ = _AUXDATA.unpack_from(content)
                    unready += bool(status & TP_STATUS_CSUMNOTREADY)
                    if status & TP_STATUS_VLAN_VALID:
                        tags[tag & 0xFFF] += 1
                        priorities.setdefault(tag & 0xFFF, set()).add(tag >> 13)
            size -= 14
            largest = max(largest, size)
            large += size > 60_000
            if data[12:14] == b"\x08\x00" and (data[20] & 0x3F or data[21]):
                fragments += 1
    return {
        "frames": frames,
        "largest": largest,
        "large": large,
        "csum_not_ready": unready,
        "fragments": fragments,
        "tags": {str(vlan): count for vlan, count in tags.items()},
        "priorities": {str(vlan): sorted(heard) for vlan, heard in priorities.items()},
    }


def dhcp_options(message: bytes) -> dict[int, bytes]:
    """The options of a DHCP message by their codes, up to one that is cut off."""
    options: dict[int, bytes] = {}
    position = _DHCP_OPTIONS
    while position < len(message) and message[position] != _DHCP_END:
        code = message[position]
        position += 1
        if code == _DHCP_PAD:
            continue
        begin = position + 1
        position = begin + int.from_bytes(message[position:begin])
        if position > len(message):
            break
        options[code] = message[begin:position]
    return options


def dhcp(
    interface: str, server: str, offer: str, timeout: float = 30.0, linger: float = 0.0
) -> dict[str, Any]:
    """A DHCP server ([RFC 2131]) for one client and one lease: *offer*, of a /24.

    It ends with the first lease, or once nobody has asked for *linger* seconds after one: a client
    that is configured twice asks twice.
    """
    leased: dict[str, Any] = {}
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    sock.setsockopt(socket.SOL_SOCKET, 25, interface.encode())  # SO_BINDTODEVICE
    sock.bind(("", 67))
    sock.settimeout(timeout)
    print("ready", flush=True)
    with sock:
        while True:
            try:
                message = sock.recv(2048)
            except TimeoutError:
                if leased:
                    return leased
                raise
            kind = dhcp_options(message).get(53)
            if kind not in (_DHCP_DISCOVER, _DHCP_REQUEST):
                continue
            head = bytearray(message[:_DHCP_OPTIONS])
            head[0] = 2
            head[16:20] = socket.inet_aton(offer)
            head[20:24] = socket.inet_aton(server)
            said = 2 if kind == _DHCP_DISCOVER else 5
            answer = bytes((53, 1, said, 54, 4)) + socket.inet_aton(server)
            answer += bytes((51, 4, 0, 0, 14, 16, 1, 4, 255, 255, 255, 0, 255))
            sock.sendto(bytes(head) + answer, ("255.255.255.255", 68))
            if kind == _DHCP_REQUEST:
                leased = {"client": head[28:34].hex(":"), "address": offer}
                if not linger:
                    return leased
                sock.settimeout(linger)


ACTIONS = {
    each.__name__: each for each in (ping, sink, source, knock, inject, offload, watch, dhcp)
}


def main() -> int:
    """One action: its name and its JSON are the arguments; prints what it saw."""
    action: Any = ACTIONS[sys.argv[1]]
    try:
        result = action(**json.loads(sys.argv[2]))
    except OSError as error:
        result = {"error": f"{error.strerror or error}"}
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
