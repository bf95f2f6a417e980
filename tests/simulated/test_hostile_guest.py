"""A guest that does anything in any order, beside a channel that must not notice.

The machine below mixes correct driver behaviour with hostile messages, page lists, rings and
packets, while the host adds, removes and resets. It asserts that nothing but a fault of a channel
comes of it, that each step is at most one log line, that the host writes to no page but those of
open rings, and that an honest heartbeat on the same bus keeps beating.
"""

from __future__ import annotations

import logging
import struct
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from hvhost.errors import RemoteProtocolError
from hvhost.machine.model import HeartbeatStatus
from hvhost.partition.memory import PAGE_SIZE, GuestMemory
from hvhost.services.heartbeat import Heartbeat
from hvhost.vmbus.channel import Channel, ChannelDevice, ChannelState
from hvhost.vmbus.protocol import (
    CloseChannel,
    GpadlBody,
    GpadlHeader,
    GpadlTeardown,
    InitiateContact,
    ModifyChannel,
    OpenChannel,
    RelidReleased,
    RequestOffers,
    Unload,
    decode,
    encode,
)
from simulated.devices import Echo, an_offer
from simulated.driver import GuestRing, GuestService, SimulatedGuest

PAGES = 48
HONEST = 1  # the heartbeat's channel id
U32 = st.integers(0, 2**32 - 1)
WORD = st.integers(0, 20000) | st.integers(0, 2500).map(lambda word: word * 8) | U32
HANDLE_NUMBERS = range(100, 104)
HANDLES = st.sampled_from(HANDLE_NUMBERS)


class HostileGuest(RuleBasedStateMachine):
    @initialize()
    def boot(self) -> None:
        self.guest = SimulatedGuest(pages=PAGES)
        self.now = 0.0
        self.heartbeat = Heartbeat(clock=lambda: self.now)
        self.guest.server.add_device(self.heartbeat)
        self.echoes: dict[int, Echo] = {}
        for number in (2, 3):
            self.plug(number)
        # Pages the hostile side lends: known to be RAM, never those of the honest channel.
        self.pool = self.guest.allocate(24, scattered=True)
        self.service: GuestService | None = None
        self.lent: set[int] = set()
        self.gpadls: dict[int, list[int]] = {}
        self.log: list[logging.LogRecord] = []
        handler = logging.Handler()
        handler.emit = self.log.append  # type: ignore[method-assign, assignment]
        self.handler = handler
        logging.getLogger("hvhost").addHandler(handler)
        self.reconnect(0x50003)
        self.remember()

    def teardown(self) -> None:
        if not hasattr(self, "guest"):
            return
        logging.getLogger("hvhost").removeHandler(self.handler)
        # Whatever happened: after a reset the machine boots and beats.
        self.guest.server.reset()
        self.service = None
        self.reconnect(0x50003)
        assert self.honest_heartbeat()

    # The host's side.

    def plug(self, number: int) -> None:
        echo = Echo(self.guest.memory, an_offer(number))
        channel = self.guest.server.add_device(echo)
        self.echoes[channel.channel_id] = echo

    def channels(self) -> list[Channel]:
        return [c for c in self.guest.server.channels if c.channel_id != HONEST]

    @rule(number=st.integers(2, 4))
    def host_adds_a_device(self, number: int) -> None:
        taken = {
            channel.offer.name
            for channel in self.channels()
            if channel.state is not ChannelState.RESCINDED
        }
        if f"echo-{number}" not in taken:
            self.plug(number)

    @rule(data=st.data())
    def host_removes_a_device(self, data: st.DataObject) -> None:
        there = [c for c in self.channels() if c.state is not ChannelState.RESCINDED]
        if there:
            self.guest.server.remove_device(data.draw(st.sampled_from(there)))

    @rule(size=st.integers(0, 3000), count=st.integers(1, 5))
    def host_sends(self, size: int, count: int) -> None:
        for channel in self.channels():
            for _ in range(count):
                channel.send(bytes(size))

    @rule()
    def host_is_another_one_now(self) -> None:
        """Saved at any moment, restored elsewhere: whatever the guest did, it goes on."""
        before = len(self.guest.faults)
        old = {
            each.channel_id: each
            for each in self.channels()
            if each.state is not ChannelState.RESCINDED
        }
        beats = self.heartbeat.state

        def devices(memory: GuestMemory) -> list[ChannelDevice]:
            self.heartbeat = Heartbeat(state=beats, clock=lambda: self.now)
            new = {n: Echo(memory, c.offer, self.echoes[n].state) for n, c in old.items()}
            self.echoes.update(new)
            return [self.heartbeat, *new.values()]

        self.guest.move_to_another_host(devices)
        assert len(self.guest.faults) <= before + len(old)
        for number, channel in old.items():
            now = next(c for c in self.guest.server.channels if c.channel_id == number)
            assert now.state in (channel.state, ChannelState.FAULTED)
            assert now.held_open == channel.held_open

    # The honest side.

    def reconnect(self, version: int) -> None:
        self.guest.connect(version)
        self.gpadls.clear()
        self.service = GuestService(self.guest.open(HONEST), [(3, 0)])
        self.service.run()
        self.service.run()

    def honest_heartbeat(self) -> bool:
        assert self.service is not None
        self.now += 2.0
        self.heartbeat.tick(self.now)
        beats = self.service.run()
        return beats == 1 and self.heartbeat.status(self.now) is HeartbeatStatus.OK

    @rule(
        end=st.sampled_from(["kexec", "unload", "reset", "contact"]),
        version=st.sampled_from([0x50003, 0x50000, 0x40001, 0x30000]),
        wrong=st.none() | st.tuples(U32, st.integers(0, 3) | U32, st.sampled_from([2, 3, 0x102])),
        stray=st.binary(max_size=60),
    )
    def boots_again(
        self, end: str, version: int, wrong: tuple[int, int, int] | None, stray: bytes
    ) -> None:
        self.service = None
        if end == "unload":
            self.post(encode(Unload()))
        elif end == "reset":
            self.guest.server.reset()
        if wrong is not None:
            self.post(encode(InitiateContact(*wrong, 0, 0)))
            self.post(stray)
        self.free_honest_pages()
        self.reconnect(version)

    def free_honest_pages(self) -> None:
        for opened in list(self.guest.open_channels.values()):
            self.guest.free([*opened.out.pfns, *opened.incoming.pfns])
        self.guest.open_channels.clear()

    @precondition(lambda self: self.service is not None)
    @rule()
    def honest_channel_works(self) -> None:
        assert self.honest_heartbeat()

    # The hostile side: messages.

    def a_relid(self, data: st.DataObject) -> int:
        """A channel of ours, or sometimes none at all."""
        numbers = [channel.channel_id for channel in self.channels()]
        return data.draw(st.sampled_from([*numbers * 5, 0, 9, 2047, 2048, 2**32 - 1]))

    def a_handle(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.gpadls)) | HANDLES if self.gpadls else HANDLES)

    def pages_of(self, relid: int) -> list[int]:
        """The pages a channel's proper ring lies in."""
        return self.pool[relid % 3 * 8 :][:8]

    def post(self, payload: bytes, connection_id: int = 4) -> None:
        """Anything at all; at most one complaint, which is logged once."""
        before = len(self.guest.faults)
        assert self.guest.server.post_message(connection_id, payload) in (0, 5)
        assert len(self.guest.faults) <= before + 1
        if self.guest.server.version is None:
            self.service = None

    @rule(payload=st.binary(max_size=250), kind=st.integers(0, 30))
    def posts_rubbish(self, payload: bytes, kind: int) -> None:
        payload = struct.pack("<II", kind, 0) + payload
        try:
            message: Any = decode(payload)
        except RemoteProtocolError:
            pass
        else:
            if getattr(message, "child_relid", None) == HONEST or (
                self.service is not None
                and getattr(message, "gpadl", None) == self.service.channel.gpadl
            ):
                return  # the honest channel is not to be harmed by its own name
        if kind not in (14, 16):  # ends of the connection have a rule of their own
            self.post(payload)

    @rule()
    def requests_offers(self) -> None:
        self.post(encode(RequestOffers()))

    @rule(
        handle=HANDLES,
        data=st.data(),
        cut=st.integers(0, 30),
        wrong=st.none() | st.sampled_from([PAGES, 2**52 - 1, 2**64 - 1, (1 << 20) + PAGES]),
        lie=st.sampled_from([0, 0, 0, 8, -8, 4096]),
    )
    def lends_pages(
        self, handle: int, data: st.DataObject, cut: int, wrong: int | None, lie: int
    ) -> None:
        relid = self.a_relid(data)
        pfns = data.draw(st.lists(st.sampled_from(self.pool), min_size=1, max_size=12))
        listed = [*pfns, *([wrong] if wrong is not None else [])]
        body = struct.pack(f"<II{len(listed)}Q", len(listed) * PAGE_SIZE, 0, *listed)
        size = max(0, len(body) + lie)
        first = body[: 8 * cut]
        self.gpadls.setdefault(handle, pfns)
        self.post(encode(GpadlHeader(relid, handle, size, 1, first)))
        if rest := body[8 * cut :]:
            self.post(encode(GpadlBody(0, handle, rest)))

    @rule(
        data=st.data(),
        vp=st.integers(0, 1) | U32,
        downstream=st.integers(0, 12) | U32,
        words=st.none() | st.lists(WORD, min_size=4, max_size=4),
    )
    def opens(self, data: st.DataObject, vp: int, downstream: int, words: list[int] | None) -> None:
        handle = self.a_handle(data)
        self.open(self.a_relid(data), handle, vp, downstream, words or [0, 0, 0, 0])

    def open(self, relid: int, handle: int, vp: int, downstream: int, words: list[int]) -> None:
        pfns = self.gpadls.get(handle, [])
        self.lent.update(pfns)
        for number, value in enumerate(words):
            for pfn in pfns:  # any of them may become a ring's header
                self.guest.memory.write(pfn * PAGE_SIZE + 4 * number, struct.pack("<I", value))
        self.post(encode(OpenChannel(relid, relid, handle, vp, downstream)))

    @rule(scattered=st.booleans(), downstream=st.sampled_from([2, 4, 6]))
    def opens_all_properly(self, scattered: bool, downstream: int) -> None:
        self.open_all(downstream, scattered=scattered)

    def open_all(self, downstream: int, *, scattered: bool) -> None:
        """As a driver that starts over: close, forget, lend, open."""
        for channel in self.channels():
            relid, handle = channel.channel_id, 1000 + channel.channel_id
            if channel.held_open:
                self.post(encode(CloseChannel(relid)))
            for number in [*HANDLE_NUMBERS, handle]:
                if self.guest.server._gpadls.channel_of(number) == relid:
                    self.post(encode(GpadlTeardown(relid, number)))
                    self.gpadls.pop(number, None)
            if channel.state is ChannelState.RESCINDED:
                continue
            pfns = self.pages_of(relid)
            pfns = pfns[::-1] if scattered else sorted(pfns)
            body = struct.pack("<II8Q", 8 * PAGE_SIZE, 0, *pfns)
            self.post(encode(GpadlHeader(relid, handle, len(body), 1, body)))
            self.gpadls[handle] = pfns
            self.open(relid, handle, 0, downstream, [0, 0, 0, 0])
            if channel.channel_id in self.guest.server._offered:
                assert channel.is_open

    @rule(data=st.data())
    def closes(self, data: st.DataObject) -> None:
        self.post(encode(CloseChannel(self.a_relid(data))))

    @rule(data=st.data())
    def tears_down(self, data: st.DataObject) -> None:
        self.post(encode(GpadlTeardown(self.a_relid(data), self.a_handle(data))))

    @rule(data=st.data())
    def releases(self, data: st.DataObject) -> None:
        self.post(encode(RelidReleased(self.a_relid(data))))

    @rule(data=st.data(), vp=st.integers(0, 1) | U32)
    def moves(self, data: st.DataObject, vp: int) -> None:
        self.post(encode(ModifyChannel(self.a_relid(data), vp)))

    @rule()
    def lets_go_of_rescinded_channels(self) -> None:
        for channel in self.channels():
            if channel.state is ChannelState.RESCINDED:
                self.post(encode(RelidReleased(channel.channel_id)))

    # The hostile side: rings.

    def signal(self, channel: Channel) -> None:
        before = len(self.guest.faults)
        assert self.guest.server.signal(channel.connection_id) in (0, 0x12)
        assert len(self.guest.faults) <= before + 1

    def an_open_channel(self, data: st.DataObject) -> Channel | None:
        """One of the open channels; all are opened properly if none is."""
        if not any(channel.is_open for channel in self.channels()):
            self.open_all(4, scattered=False)
        there = [channel for channel in self.channels() if channel.is_open]
        return data.draw(st.sampled_from(there)) if there else None

    @rule(
        data=st.data(), outgoing=st.booleans(), word=st.sampled_from([0, 1, 2, 3, 16]), value=WORD
    )
    def pokes_a_header(self, data: st.DataObject, outgoing: bool, word: int, value: int) -> None:
        channel = self.an_open_channel(data)
        if channel is None:
            return
        pages, downstream = self.rings_of(channel)
        header = pages[downstream if outgoing else 0]
        self.guest.memory.write(header * PAGE_SIZE + 4 * word, struct.pack("<I", value))
        self.signals_everything()

    def rings_of(self, channel: Channel) -> tuple[list[int], int]:
        """Page frame numbers of both rings, and where the host's starts."""
        assert channel.ring_gpadl is not None and channel._incoming is not None
        pages = list(channel.gpadl(channel.ring_gpadl).ranges[0].pfns)
        return pages, channel._incoming._ring.size // PAGE_SIZE + 1

    @rule(
        data=st.data(),
        kind=st.sampled_from([6, 6, 9, 9, 11, 7, 0, 99]),
        offset8=st.integers(0, 8),
        length8=st.integers(0, 40) | st.just(0xFFFF),
        content=st.binary(max_size=120),
        count=st.integers(1, 8),
    )
    def writes_packets(
        self,
        data: st.DataObject,
        kind: int,
        offset8: int,
        length8: int,
        content: bytes,
        count: int,
    ) -> None:
        channel = self.an_open_channel(data)
        if channel is None:
            return
        pages, downstream = self.rings_of(channel)
        ring = GuestRing(self.guest.memory, pages[:downstream])
        honest = data.draw(st.sampled_from([True, True, True, False]))
        for _ in range(count):
            start = ring.word(0)
            if start >= ring.size or start % 8:
                break
            if honest:
                content = content[: len(content) & ~7]
                packet = struct.pack("<HHHHQ", 6, 2, 2 + len(content) // 8, 1, start) + content
            else:
                packet = struct.pack("<HHHHQ", kind, offset8, length8, 0, 1) + content
            packet += bytes(-len(packet) % 8 + 8)
            ring.put(start, packet)
            ring.set_word(0, (start + len(packet)) % ring.size)
        self.signal(channel)

    def signals_everything(self) -> None:
        for channel in self.channels():
            self.signal(channel)

    # What must hold after every step.

    def remember(self) -> None:
        self.shadow = (bytes(self.guest.low), bytes(self.guest.high))

    def writable(self) -> set[int]:
        """Pages the host may write: rings of open channels, and those the test wrote itself."""
        pages = set(self.lent)
        for opened in self.guest.open_channels.values():
            pages |= opened.pages
        return pages

    @invariant()
    def nothing_else_is_written(self) -> None:
        if not hasattr(self, "shadow"):
            return
        allowed = self.writable()
        for base, new, old in (
            (0, self.guest.low, self.shadow[0]),
            ((1 << 32) // PAGE_SIZE, self.guest.high, self.shadow[1]),
        ):
            if new == old:
                continue
            for page in range(PAGES):
                window = slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
                if base + page not in allowed:
                    assert new[window] == old[window], f"page {base + page:#x} was written"
        # From here on only pages of channels that are open now may change.
        self.lent.clear()
        for channel in self.channels():
            if channel.is_open and channel.ring_gpadl is not None:
                self.lent.update(channel.gpadl(channel.ring_gpadl).ranges[0].pfns)
        self.remember()

    @invariant()
    def each_fault_is_one_log_line(self) -> None:
        if hasattr(self, "log"):
            warnings = [r.getMessage() for r in self.log if r.levelno >= logging.WARNING]
            assert warnings == self.guest.faults

    @invariant()
    def states_agree(self) -> None:
        if not hasattr(self, "guest"):
            return
        open_ids = {c.connection_id for c in self.guest.server.channels if c.is_open}
        assert open_ids == set(self.guest.port.connected)
        for channel in self.channels():
            echo = self.echoes[channel.channel_id]
            if channel.device is echo:
                assert channel.is_open == (echo.channel is channel)


HostileGuest.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestHostileGuest = HostileGuest.TestCase
