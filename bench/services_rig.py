"""Integration services and sockets of a real guest: round trips, throughput, rates."""

from __future__ import annotations

import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bench.measurement import Measurement
from hvhost.errors import HvHostError
from hvhost.guests.probe import ProbeClient
from hvhost.machine.serial import listen
from hvhost.manager.client import MachineClient
from hvhost.manager.probe import connect_probe
from hvhost.sockets.protocol import listen_name, service_id

ECHO_PORT, SINK_PORT = 7000, 7001
ROUND_TRIPS = 300
HEARTBEATS = 200
STREAM = 8 << 20
FILE = 8 << 20
ITEMS = 200
MIB = 1 << 20
#: Patience, which no figure counts: a busy computer's emulated processors are slow.
READY_SECONDS = 300.0
DATA_SECONDS = 300.0


def _wait(client: MachineClient) -> ProbeClient:
    """The probe of a guest whose drivers and daemons are there."""
    probe = connect_probe(client.directory, READY_SECONDS)
    probe.wait_ready(READY_SECONDS)
    deadline = time.monotonic() + READY_SECONDS
    while not ((info := client.info()).kvp_ready and info.file_copy_ready):
        if time.monotonic() > deadline:
            raise HvHostError("the guest's daemons did not come.")
        time.sleep(0.2)
    return probe


def _round_trip(client: MachineClient) -> float:
    """Seconds, the median, until a program of the guest has sent eight bytes back."""
    taken = []
    with client.connect(ECHO_PORT) as stream:
        stream.settimeout(DATA_SECONDS)
        for number in range(ROUND_TRIPS):
            message = number.to_bytes(8, "little")
            start = time.perf_counter()
            stream.sendall(message)
            answer = stream.recv(8, socket.MSG_WAITALL)
            taken.append(time.perf_counter() - start)
            if answer != message:
                raise HvHostError("the guest sent something else back.")
    return statistics.median(taken)


def _there_and_back(client: MachineClient) -> float:
    """Seconds for a stream to the guest, all of which comes back."""
    data = os.urandom(STREAM)
    with client.connect(ECHO_PORT) as stream:
        stream.settimeout(DATA_SECONDS)
        feeder = threading.Thread(target=stream.sendall, args=(data,), daemon=True)
        start = time.perf_counter()
        feeder.start()
        back = bytearray()
        while len(back) < STREAM and (part := stream.recv(1 << 18)):
            back += part
        seconds = time.perf_counter() - start
        feeder.join(DATA_SECONDS)
    if back != data:
        raise HvHostError("the guest sent something else back.")
    return seconds


def _from_guest(client: MachineClient, probe: ProbeClient) -> float:
    """Seconds for a stream from a program of the guest."""
    with listen(client.directory.path / listen_name(service_id(SINK_PORT))) as listener:
        listener.settimeout(DATA_SECONDS)
        probe.run(
            f"head -c {STREAM} /dev/zero > /tmp/zero; "
            f"hvhost-probe connect {SINK_PORT} </tmp/zero >/dev/null 2>&1 &"
        )
        stream, _ = listener.accept()
        with stream:
            stream.settimeout(DATA_SECONDS)
            start, moved = time.perf_counter(), 0
            while moved < STREAM and (part := stream.recv(1 << 18)):
                moved += len(part)
            seconds = time.perf_counter() - start
    if moved < STREAM:
        raise HvHostError(f"of {STREAM} bytes the guest sent {moved}.")
    return seconds


def _copy(client: MachineClient, probe: ProbeClient) -> float:
    """Seconds for a file; the worker's own count, from the first message to the last answer."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(os.urandom(FILE))
        file.flush()
        done = client.copy(Path(file.name), "/tmp/bench/file", create_path=True, overwrite=True)
    if probe.run("stat -c %s /tmp/bench/file").text != str(FILE):
        raise HvHostError("the guest does not have the whole file.")
    return done.seconds


def _items(client: MachineClient) -> tuple[float, float]:
    """Seconds to set one key-value pair, and to read one."""
    start = time.perf_counter()
    for number in range(ITEMS):
        client.kvp_set(f"bench {number % 8}", f"value {number}")
    middle = time.perf_counter()
    for number in range(ITEMS):
        client.kvp_get(f"bench {number % 8}")
    return (middle - start) / ITEMS, (time.perf_counter() - middle) / ITEMS


def _echo(probe: ProbeClient) -> None:
    """Have a program of the guest send back what it gets."""
    probe.run(f"setsid hvhost-probe listen {ECHO_PORT} </dev/null >/tmp/echo.log 2>&1 &")
    deadline = time.monotonic() + READY_SECONDS
    while "listening" not in probe.run("cat /tmp/echo.log").text:
        if time.monotonic() > deadline:
            raise HvHostError("no program of the guest can listen on AF_VSOCK.")
        time.sleep(0.2)


def measure(client: MachineClient) -> Iterator[Measurement]:
    """All figures of a running guest that carries the probe, each when it is known."""
    name, heartbeat = "services-rig", "heartbeat"
    probe = _wait(client)
    beat = statistics.median(client.measure_heartbeats(HEARTBEATS))
    set_item, get_item = _items(client)
    yield Measurement(name, "KVP set", 1 / set_item, "/s", "heartbeats", 1 / beat)
    yield Measurement(name, "KVP get", 1 / get_item, "/s", "heartbeats", 1 / beat)
    _echo(probe)
    trip = _round_trip(client)
    yield Measurement(name, "hv_sock round trip", trip * 1e6, "µs", heartbeat, beat * 1e6)
    yield Measurement(
        name, "hv_sock there and back", STREAM / MIB / _there_and_back(client), "MiB/s"
    )
    stream = STREAM / MIB / _from_guest(client, probe)
    yield Measurement(name, "hv_sock from the guest", stream, "MiB/s")
    copy = FILE / MIB / _copy(client, probe)
    yield Measurement(name, "file copy", copy, "MiB/s", "hv_sock from guest", stream)
    probe.close()
