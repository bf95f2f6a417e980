"""Channels: interrupts, flow control both ways, faults, and what devices may rely on."""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from typing import Generic, TypeVar

import pytest

from hvhost.errors import LocalProtocolError, RemoteProtocolError
from hvhost.partition.memory import PAGE_SIZE, GuestMemory
from hvhost.vmbus import channel as channel_module
from hvhost.vmbus.channel import Channel, ChannelState, Packet, PacketType
from hvhost.vmbus.ring import encode_packet
from simulated.devices import Echo, Recorder, an_offer
from simulated.driver import GuestChannel, SimulatedGuest

D = TypeVar("D", bound=Recorder | Echo)


class Bench(Generic[D]):
    """A guest with one open channel to *device*."""

    def __init__(
        self, make: Callable[[GuestMemory], D], *, out_pages: int = 4, in_pages: int = 4
    ) -> None:
        self.guest = SimulatedGuest()
        self.device = make(self.guest.memory)
        self.host: Channel = self.guest.server.add_device(self.device)
        self.guest.connect()
        self.channel: GuestChannel = self.guest.open(1, out_pages=out_pages, in_pages=in_pages)
        self.guest.port.interrupts.clear()

    @property
    def interrupts(self) -> list[tuple[int, int]]:
        """What the host raised since this was asked last."""
        taken = list(self.guest.port.interrupts)
        self.guest.port.interrupts.clear()
        return taken


def recorder(memory: GuestMemory) -> Recorder:
    return Recorder()


def test_packets_are_handed_to_the_device_and_answered() -> None:
    bench = Bench(Echo)
    bench.channel.write(b"question", transaction_id=77, flags=1)
    assert bench.interrupts == [(0, 1)]
    (answer,) = bench.channel.read()
    assert (answer.type, answer.transaction_id, answer.payload) == (11, 77, b"question")
    assert (bench.host.packets_received, bench.host.packets_sent, bench.host.interrupts) == (
        1,
        1,
        1,
    )


def test_a_gpa_direct_packet_reaches_guest_memory() -> None:
    bench = Bench(Echo)
    first, second = bench.guest.allocate(2, scattered=True)
    bench.guest.memory.write(first * PAGE_SIZE + 4090, b"split ")
    bench.guest.memory.write(second * PAGE_SIZE, b"buffer")
    header = struct.pack("<IIIIQQ", 0, 1, 12, 4090, first, second)
    bench.channel.write(b"", packet_type=9, transaction_id=5, header=header)
    (answer,) = bench.channel.read()
    assert answer.payload.startswith(b"split buffer")


def test_a_gpa_direct_packet_outside_memory_faults_its_channel() -> None:
    bench = Bench(Echo)
    header = struct.pack("<IIIIQ", 0, 1, 12, 0, 1 << 40)
    bench.channel.write(b"", packet_type=9, header=header)
    assert bench.host.state is ChannelState.FAULTED
    assert bench.guest.faults == [
        "channel 1 (echo-1) faulted: guest memory 0x10000000000000+0xc is not RAM; "
        "the guest named a wrong address."
    ]


def test_many_answers_are_one_interrupt() -> None:
    bench = Bench(Echo, out_pages=8, in_pages=8)
    for number in range(300):
        bench.channel.write(b"", transaction_id=number, signal=False)
    bench.channel.signal()
    assert bench.interrupts == [(0, 1)]
    assert [packet.transaction_id for packet in bench.channel.read()] == list(range(300))


def test_packets_with_more_to_come_are_one_interrupt() -> None:
    bench = Bench(recorder)
    assert bench.host.send(b"first", more=True) and bench.host.send(b"second", more=True)
    assert bench.interrupts == []
    bench.host.flush()
    assert bench.interrupts == [(0, 1)]
    bench.host.flush()
    assert bench.interrupts == [] and len(bench.channel.read()) == 2


def test_a_guest_that_reads_is_not_interrupted() -> None:
    bench = Bench(Echo)
    bench.channel.incoming.set_word(2, 1)
    bench.channel.write(b"")
    assert bench.host.send(b"more")
    assert bench.interrupts == []
    bench.channel.incoming.set_word(2, 0)
    assert bench.host.send(b"and more")
    assert bench.interrupts == [(0, 1)]


def test_packets_that_do_not_fit_wait_and_go_out_in_order() -> None:
    bench = Bench(recorder, in_pages=2)
    sent = [bytes([number]) * 1000 for number in range(20)]
    for payload in sent:
        assert bench.host.send(payload)
    assert bench.host.queued == 17
    assert bench.channel.incoming.word(3) == 1024
    got = []
    while packets := bench.channel.read(limit=1):
        got += [packet.payload for packet in packets]
    assert got == sent
    assert (bench.host.queued, bench.channel.incoming.word(3)) == (0, 0)


def test_a_small_packet_does_not_overtake_a_large_one() -> None:
    bench = Bench(recorder, in_pages=2)
    for _ in range(4):
        assert bench.host.send(bytes(1000))
    assert bench.host.queued == 1
    assert bench.host.send(b"small"), "there would be room for it"
    assert bench.host.queued == 2
    got: list[bytes] = []
    while packets := bench.channel.read(limit=1):
        got += [packet.payload.rstrip(b"\0") for packet in packets]
    assert got == [b""] * 4 + [b"small"]


def answering(bench: Bench[Recorder], numbers: range, payload: bytes) -> None:
    """Answer the next packet with completions of all *numbers*, by one call."""

    def answer(packet: Packet) -> None:
        assert bench.host.send_completions(numbers, payload)

    bench.device.on_packet = answer
    bench.channel.write(b"")


def test_several_completions_are_one_interrupt() -> None:
    bench = Bench(recorder)
    answering(bench, range(5), b"done")
    assert bench.interrupts == [(0, 1)] and bench.host.packets_sent == 5
    packets = bench.channel.read()
    assert [(each.type, each.transaction_id) for each in packets] == [(11, n) for n in range(5)]
    assert bench.host.send_completions((7, 8), b"later") and (0, 1) in bench.interrupts
    assert [each.transaction_id for each in bench.channel.read()] == [7, 8]
    bench.guest.close(1)
    assert not bench.host.send_completions((9,), b"")


def test_completions_that_do_not_all_fit_wait_in_order() -> None:
    bench = Bench(recorder, in_pages=2)
    answering(bench, range(6), bytes(1000))
    assert bench.host.queued == 3
    answering(bench, range(6, 8), b"")
    assert bench.host.queued == 5, "nor do small ones overtake"
    got: list[int] = []
    while packets := bench.channel.read(limit=1):
        got += [packet.transaction_id for packet in packets]
    assert got == list(range(8))


def test_encoded_packets_go_out_as_they_are_or_wait() -> None:
    bench = Bench(recorder, in_pages=2)
    waiting = [encode_packet(PacketType.COMP, 0, number, bytes(1000)) for number in range(5)]

    def settle() -> None:
        bench.host.send_encoded(waiting)
        waiting[:] = [encode_packet(PacketType.COMP, 0, 5, b"")]

    bench.host.settle = settle
    bench.channel.write(b"")
    assert bench.interrupts == [(0, 1)] and bench.host.queued == 2
    bench.channel.write(b"")
    assert bench.host.queued == 3
    bench.host.settle = None
    got: list[int] = []
    while packets := bench.channel.read(limit=1):
        got += [packet.transaction_id for packet in packets]
    assert got == list(range(6)) and bench.host.packets_sent == 6
    bench.guest.close(1)
    bench.host.send_encoded(waiting)
    assert not bench.guest.faults


def test_a_device_settles_after_each_look_while_it_is_there() -> None:
    bench = Bench(recorder)
    looks: list[int] = []
    bench.host.settle = lambda: looks.append(len(bench.device.packets))
    for _ in range(3):
        bench.channel.write(b"", signal=False)
    bench.channel.signal()
    bench.host.process()
    assert looks == [3, 3]
    bench.device.on_packet = lambda packet: bench.guest.server.remove_device(bench.host)
    bench.channel.write(b"")
    assert looks == [3, 3] and not bench.guest.faults


def test_a_flush_within_a_look_waits_for_its_end() -> None:
    bench = Bench(recorder)
    seen: list[int] = []

    def answer(packet: Packet) -> None:
        bench.host.send(b"answer", more=True)
        bench.host.flush()
        seen.append(len(bench.guest.port.interrupts))

    bench.device.on_packet = answer
    for _ in range(2):
        bench.channel.write(b"", signal=False)
    bench.channel.signal()
    assert seen == [0, 0] and bench.interrupts == [(0, 1)]


def test_what_a_device_serves_itself_counts_towards_one_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel_module, "PROCESS_PACKETS", 10)
    bench = Bench(recorder)
    served: list[int] = []

    def serve(data: bytes) -> int:
        served.append(len(data))
        return len(data)

    bench.host.serve = serve
    for _ in range(20):
        bench.channel.write(bytes(40), signal=False)
    assert bench.host.process(), "64 bytes count as a packet"
    assert served == [20 * 64] and not bench.host.process()
    bench.channel.write(bytes(40), signal=False)
    assert not bench.host.process() and served == [20 * 64, 64]
    assert bench.device.packets == []


def test_room_that_appears_before_the_host_asks_for_it_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(recorder, in_pages=2)
    for _ in range(3):
        assert bench.host.send(bytes(1000))
    outgoing = bench.host._outgoing
    assert outgoing is not None
    ask = type(outgoing).ask_for_room

    def race(self: object, packet: bytes | None) -> None:
        bench.channel.read()  # the guest reads between our failed write and our asking
        ask(outgoing, packet)

    monkeypatch.setattr(type(outgoing), "ask_for_room", race)
    assert bench.host.send(bytes(1000))
    assert bench.host.queued == 0


def test_a_waiting_guest_is_interrupted_when_there_is_room() -> None:
    bench = Bench(recorder, out_pages=2)
    bench.channel.out.set_word(2, 1)
    while bench.channel.write(bytes(1000), signal=False):
        pass
    bench.channel.wait_for_room(1024)
    bench.channel.incoming.set_word(2, 1)  # its own mask is for packets, not for room
    bench.channel.signal()
    assert bench.interrupts == [(0, 1)]
    assert bench.channel.out.used == 0


def test_a_guest_that_reads_nothing_is_not_read_either_but_later() -> None:
    bench = Bench(Echo, out_pages=9, in_pages=2)
    for number in range(1000):
        assert bench.channel.write(b"", transaction_id=number, signal=False)
    bench.channel.signal()
    waiting = bench.host.queued
    assert channel_module.QUEUE_THROTTLE < waiting < channel_module.QUEUE_LIMIT
    assert bench.channel.out.used > 0
    assert bench.channel.out.word(2) == 0  # not masked: nobody is reading
    got: list[int] = []
    while packets := bench.channel.read():  # each time with Linux's signal of new room
        got += [packet.transaction_id for packet in packets]
    assert got == list(range(1000))
    assert bench.host.state is ChannelState.OPEN


def test_a_guest_that_never_reads_is_at_fault() -> None:
    bench = Bench(recorder, in_pages=2)
    for _ in range(5000):
        if not bench.host.send(bytes(1000)):
            break
    assert bench.guest.faults == [
        "channel 1 (echo-1) faulted: the guest does not empty its ring; 1024 packets wait for it."
    ]
    assert bench.host.queued == 0


def test_a_ring_smaller_than_a_packet_is_at_fault() -> None:
    bench = Bench(recorder, in_pages=2)
    assert not bench.host.send(bytes(4096))
    assert "too small for a packet of 4112 bytes" in bench.guest.faults[0]


def test_a_broken_ring_faults_the_channel_from_either_side() -> None:
    for sends in (False, True):
        bench = Bench(recorder)
        if sends:
            bench.channel.incoming.set_word(1, 0xFFFFFFF8)
            assert not bench.host.send(b"x")
        else:
            bench.channel.out.set_word(0, 0xFFFFFFF8)
            assert not bench.host.process()
        assert len(bench.guest.faults) == 1 and "0xfffffff8" in bench.guest.faults[0]
        assert bench.host.state is ChannelState.FAULTED
        assert not bench.guest.port.connected
        assert bench.device.channel is None


def test_an_error_of_the_device_faults_its_channel_once(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(Echo)
    with caplog.at_level(logging.INFO):
        bench.channel.write(b"first", signal=False)
        bench.channel.write(b"refused!", signal=False)
        bench.channel.write(b"never seen", signal=False)
        bench.channel.signal()
        bench.channel.write(b"refused!")
    assert bench.host.packets_received == 3
    assert (bench.device.state.packets, bench.device.closes) == (2, 1)
    assert [record.getMessage() for record in caplog.records] == bench.guest.faults
    assert bench.guest.faults == [
        "channel 1 (echo-1) faulted: the guest sent what it must not send."
    ]
    assert not bench.host.send(b"x") and not bench.host.process()


def test_a_channel_faults_once() -> None:
    bench = Bench(recorder)
    bench.host.fault("it did this.")
    bench.host.fault("and that.")
    assert bench.guest.faults == ["channel 1 (echo-1) faulted: it did this."]
    bench.guest.server.remove_device(bench.host)
    bench.host.fault("nobody is there.")
    assert len(bench.guest.faults) == 1 and bench.host.state is ChannelState.RESCINDED


def test_an_error_in_opened_faults_the_channel() -> None:
    class Refusing(Recorder):
        def opened(self, channel: Channel) -> None:
            raise RemoteProtocolError("not like this.")

    guest = SimulatedGuest()
    channel = guest.server.add_device(Refusing())
    guest.connect()
    guest.open(1)
    assert channel.state is ChannelState.FAULTED and len(guest.faults) == 1


def test_a_broken_ring_unwinds_the_device_that_sends() -> None:
    reached: list[Packet] = []

    def answer(packet: Packet) -> None:
        assert bench.device.channel is not None
        bench.device.channel.send(b"answer")
        reached.append(packet)

    bench = Bench(lambda memory: Recorder(on_packet=answer))
    bench.channel.incoming.set_word(1, 4)
    bench.channel.write(b"question")
    assert reached == [] and bench.host.state is ChannelState.FAULTED


def test_a_faulted_channel_can_be_closed_and_opened_again() -> None:
    bench = Bench(Echo)
    bench.channel.write(b"refuse")
    bench.guest.close(1)
    assert bench.host.state is ChannelState.CLOSED
    channel = bench.guest.open(1, scattered=True)
    channel.write(b"hello")
    assert len(channel.read()) == 1


def test_a_long_queue_is_left_for_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "PROCESS_PACKETS", 100)
    bench = Bench(recorder, out_pages=9)
    for _ in range(300):
        bench.channel.write(b"", signal=False)
    assert bench.host.process()
    assert bench.channel.out.word(2) == 1  # still reading: no signals, please
    assert bench.host.process()
    assert not bench.host.process()
    assert bench.host.packets_received == 300 and bench.channel.out.word(2) == 0


def test_a_signal_reads_everything_or_faults_an_endless_guest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel_module, "PROCESS_PACKETS", 1)
    bench = Bench(recorder)
    for _ in range(20):
        bench.channel.write(b"", signal=False)
    assert bench.channel.signal() == 0
    assert bench.host.packets_received == 20

    def refill(packet: Packet) -> None:
        assert bench.channel.write(b"", signal=False)

    bench.device.on_packet = refill
    bench.channel.write(b"")
    assert "faster than it can be read" in bench.guest.faults[0]


def test_a_ring_filled_before_its_channel_is_open_is_at_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel_module, "PROCESS_PACKETS", 1)

    class Filled(Recorder):
        def opened(self, channel: Channel) -> None:
            ring = channel._incoming._ring  # type: ignore[union-attr]
            for start in (0, 24):
                ring.write(start, struct.pack("<HHHHQQ", 6, 2, 2, 0, 0, start << 32))
            ring.header[0] = 48

    guest = SimulatedGuest()
    guest.server.add_device(Filled())
    guest.connect()
    guest.open(1)
    assert "before it knew" in guest.faults[0]


def test_a_device_may_be_removed_while_it_receives() -> None:
    bench = Bench(recorder)
    bench.device.on_packet = lambda packet: bench.guest.server.remove_device(bench.host)
    for _ in range(3):
        bench.channel.write(b"", signal=False)
    bench.channel.signal()
    assert len(bench.device.packets) == 1 and not bench.guest.faults
    assert bench.guest.take_rescinds() == [1]
    assert bench.host.state is ChannelState.RELEASED


def test_transfer_pages_and_completion_requests_go_out_as_asked() -> None:
    bench = Bench(recorder)
    header = struct.pack("<HBBIII", 0xCAFE, 0, 0, 1, 100, 200)
    bench.host.send(
        b"rndis",
        packet_type=PacketType.DATA_USING_XFER_PAGES,
        transaction_id=9,
        completion_requested=True,
        header=header,
    )
    (packet,) = bench.channel.read()
    assert (packet.type, packet.flags, packet.transaction_id, packet.header) == (7, 1, 9, header)
    assert packet.payload == b"rndis\0\0\0"


def test_a_channel_finds_its_own_page_lists_only() -> None:
    bench = Bench(recorder)
    pfns = bench.guest.allocate(3)
    handle, _ = bench.guest.make_gpadl(1, [(3 * PAGE_SIZE, 0, pfns)])
    assert list(bench.host.gpadl(handle).ranges[0].pfns) == pfns
    with pytest.raises(RemoteProtocolError):
        bench.host.gpadl(handle + 1)


def test_states_that_do_not_follow_are_our_bug() -> None:
    bench = Bench(recorder)
    with pytest.raises(LocalProtocolError, match="cannot become released"):
        bench.host.release()
    bench.host.rescind()
    with pytest.raises(LocalProtocolError, match="cannot become offered"):
        bench.host.disconnect()
    bench.host.fault("too late")
    assert bench.host.state is ChannelState.RESCINDED and not bench.guest.faults


class Elsewhere(Recorder):
    """A device whose rings another process has."""

    signal = -1

    def __init__(self) -> None:
        super().__init__()
        self.signals = 0

    def signalled(self) -> None:
        self.signals += 1

    def open_rings(
        self, channel: Channel, pages: object, downstream: int, target_vp: int
    ) -> None: ...

    def moved(self, target_vp: int) -> None: ...


def test_a_channel_that_is_served_elsewhere_is_neither_read_nor_saved_here() -> None:
    bench = Bench(lambda _: Elsewhere())
    assert bench.host.elsewhere is not None
    bench.channel.write(b"for the other process")  # which is woken when it opens, too
    assert isinstance(bench.device, Elsewhere) and bench.device.signals == 2
    with pytest.raises(LocalProtocolError, match="served by another process"):
        bench.host.save(offered=True)
    bench.guest.close(1)
    assert bench.host.save(offered=True).rings is None
    assert not bench.guest.faults


def test_a_channel_names_itself() -> None:
    channel = SimulatedGuest().server.add_device(Recorder(an_offer(3)))
    assert repr(channel) == "<Channel 1 echo-3 offered>"
    assert channel.connection_id == 0x2001


def test_a_closed_channel_has_no_ring_to_measure() -> None:
    bench = Bench(recorder, in_pages=3)
    assert bench.host.outgoing_size == 2 * PAGE_SIZE
    bench.guest.close(1)
    with pytest.raises(LocalProtocolError, match="has no ring"):
        _ = bench.host.outgoing_size
