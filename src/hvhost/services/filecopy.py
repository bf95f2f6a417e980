"""File copy: a file of the host into the guest, without a network.

One message at a time (see ``filecopy_protocol.py``), each sent when the one before was answered; a
copy in which a guest lets :data:`ANSWER_SECONDS` pass is given up. What was started and not
completed is taken back: with CANCEL where the guest's daemon knows it (``hv_fcopy_daemon`` then
removes the file), by emptying the file where it does not (``hv_fcopy_uio_daemon``).

A guest that has just booted is given :data:`DAEMON_SECONDS`: its driver opens the channel, and
Linux's in the kernel answers HV_E_FAIL until its daemon has registered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from hvhost.errors import HvHostError
from hvhost.services.filecopy_protocol import (
    DATA_FRAGMENT,
    FILECOPY_OFFER,
    FILECOPY_VERSIONS,
    CopyFlags,
    FileCopyOperation,
    Target,
    check_uio_target,
    failure,
    plain_body,
    refusal,
    start_body,
    write_body,
)
from hvhost.services.integration import Conversation, ConversationState
from hvhost.services.protocol import HV_E_FAIL, HV_S_OK, IcMessageType
from hvhost.vmbus.channel import Channel, Offer, Packet

#: Seconds for one answer; Linux's driver itself gives up on its daemon after 30.
ANSWER_SECONDS: Final = 40.0
#: Seconds a copy waits for a driver and a daemon that take it.
DAEMON_SECONDS: Final = 10.0


_NO_DRIVER: Final = (
    f"The guest has taken no files for {DAEMON_SECONDS:g} s: it has not booted, or has neither "
    "hv_utils with hv_fcopy_daemon nor uio_hv_generic with hv_fcopy_uio_daemon; install "
    "hyperv-daemons in it."
)


class Step(StrEnum):
    """What the guest is being asked; the transitions are in :meth:`FileCopy._answered`."""

    AWAIT = "await"  # nothing: there is no daemon yet
    START = "start"
    WRITE = "write"
    ASK_WHY = "ask-why"
    COMPLETE = "complete"
    CANCEL = "cancel"
    EMPTY = "empty"
    CLOSE = "close"


@dataclass(slots=True)
class FileCopyState:
    """A copy does not outlive its channel, so only the conversation can be resumed.

    ``user_space``: the guest's driver is a daemon on UIO.
    """

    conversation: ConversationState = field(default_factory=ConversationState)
    user_space: bool = False


class CopyFailed(HvHostError):  # noqa: N818 — an outcome, not an accident
    """A copy ended without the file being whole in the guest; says what is there instead."""


@dataclass(slots=True)
class Copy:
    """One copy under way.

    *read* gives up to so many bytes (second) at an offset (first); fewer mean the file's end.
    *done* gets ``None`` if the file is whole in the guest.
    """

    target: Target
    flags: CopyFlags
    size: int
    read: Callable[[int, int], bytes]
    done: Callable[[HvHostError | None], None]
    copied: int = 0
    step: Step = Step.START
    pending: int = 0  # bytes in the WRITE that is not answered yet
    problem: str | None = None
    asked_at: float | None = None
    awaited_at: float | None = None


class FileCopy:
    """The file copy device; the machine calls :meth:`tick` now and then."""

    offer: Offer = FILECOPY_OFFER

    def __init__(self) -> None:
        self.state = FileCopyState()
        self._conversation = Conversation(
            "file-copy", IcMessageType.FCOPY, FILECOPY_VERSIONS, self.state.conversation
        )
        self._channel: Channel | None = None
        self._copy: Copy | None = None
        self._has_daemon = False  # one has answered since the channel was opened

    @property
    def ready(self) -> bool:
        """A driver in the guest takes files (its daemon may still be missing)."""
        return self._conversation.ready

    @property
    def copy(self) -> Copy | None:
        """The copy under way."""
        return self._copy

    def start(self, copy: Copy) -> None:
        """Begin *copy*, as soon as the guest takes files.

        :class:`HvHostError` if that is not possible now.
        """
        if self._copy is not None:
            raise HvHostError(
                f"{self._copy.target} is being copied into this guest; wait for that or cancel it."
            )
        if self.ready:
            self._check(copy)
        self._copy = copy
        if self.ready:
            self._begin(copy)
        else:
            copy.step = Step.AWAIT

    def _check(self, copy: Copy) -> None:
        """:class:`HvHostError` if a guest that takes files cannot be asked to take this one."""
        if self.state.conversation.unanswered:
            raise HvHostError(
                "The guest has not answered the last file copy message; restart its file copy "
                "daemon."
            )
        if self.state.user_space:
            check_uio_target(copy.target)

    def _begin(self, copy: Copy) -> None:
        self._ask(copy, Step.START, start_body(copy.target, copy.flags, copy.size))

    def cancel(self) -> None:
        """Give the copy under way up, as soon as the guest has answered what it was asked."""
        copy = self._copy
        if copy is not None and copy.step in (Step.AWAIT, Step.START, Step.WRITE):
            copy.problem = f"The copy was cancelled after {copy.copied} of {copy.size} bytes."

    def tick(self, now: float) -> None:
        """Give up on a guest that does not answer; *now* in seconds on any steady clock.

        Time in which nobody ticked (a paused machine) does not count.
        """
        copy = self._copy
        if copy is None:
            return
        if copy.step is Step.AWAIT:
            self._await_daemon(copy, now)
        elif copy.asked_at is None or now < copy.asked_at:
            copy.asked_at = now
        elif now - copy.asked_at >= ANSWER_SECONDS:
            self._end(
                copy,
                f"{copy.problem or ''} The guest has not answered for {ANSWER_SECONDS:g} s: it "
                f"hangs, or its file copy daemon does. What there is of {copy.target} in the "
                "guest is incomplete.".lstrip(),
            )

    def _await_daemon(self, copy: Copy, now: float) -> None:
        """Ask a guest that may have a daemon by now, unless it has been long enough."""
        if copy.awaited_at is None:
            copy.awaited_at = now
        if copy.problem is not None:
            self._end(copy, copy.problem)
        elif now - copy.awaited_at >= DAEMON_SECONDS:
            self._end(copy, refusal(HV_E_FAIL, copy.target) if self.ready else _NO_DRIVER)
        elif self.ready:
            try:
                self._check(copy)
            except HvHostError as error:
                self._end(copy, str(error))
            else:
                self._begin(copy)

    # For the channel.

    def opened(self, channel: Channel) -> None:
        self._channel, self._has_daemon = channel, False
        self._conversation.opened(channel)

    def closed(self) -> None:
        self._channel = None
        self._conversation.closed()
        copy = self._copy
        if copy is not None:
            self._end(
                copy,
                f"The guest's file copy service went away after {copy.copied} of {copy.size} "
                f"bytes; what there is of {copy.target} in the guest is incomplete.",
            )

    def received(self, packet: Packet) -> None:
        message = self._conversation.received(packet)
        if message is None:
            # The kernel's driver answers with the packet's own number, the daemon does not.
            transaction = self.state.conversation.last_transaction
            self.state.user_space = packet.transaction_id != transaction
            self._has_daemon = self.state.user_space
        elif self._copy is not None:
            self._answered(self._copy, message.status)

    def _answered(self, copy: Copy, status: int) -> None:
        ok = status == HV_S_OK
        self._has_daemon |= status != HV_E_FAIL
        match copy.step:
            case Step.START if not ok and not self._has_daemon:
                copy.step = Step.AWAIT
            case Step.START if not ok:
                self._end(copy, refusal(status, copy.target))
            case Step.START | Step.WRITE:
                copy.copied += copy.pending if ok else 0
                copy.pending = 0
                if status == HV_E_FAIL and copy.problem is None:
                    # Both daemons call a write that was cut short an error without a name, which
                    # is what a disk that becomes full does first. A write behind it tells.
                    self._ask(copy, Step.ASK_WHY, write_body(copy.copied + DATA_FRAGMENT, b"\0"))
                    return
                if not ok:
                    copy.problem = copy.problem or failure(status, copy.target)
                self._go_on(copy)
            case Step.ASK_WHY:
                copy.problem = failure(HV_E_FAIL if ok else status, copy.target)
                self._go_on(copy)
            case Step.COMPLETE if ok:
                self._end(copy, None)
            case Step.COMPLETE:
                copy.problem = failure(status, copy.target)
                self._go_on(copy)
            case Step.CANCEL if ok:
                self._end(copy, f"{copy.problem} Nothing of it is left in the guest.")
            case Step.CANCEL:
                body = start_body(copy.target, CopyFlags.OVER_WRITE, 0)
                self._ask(copy, Step.EMPTY, body)
            case Step.EMPTY if ok:
                self._ask(copy, Step.CLOSE, plain_body(FileCopyOperation.COMPLETE_FCOPY))
            case Step.CLOSE:
                self._end(copy, f"{copy.problem} An empty {copy.target} is left in the guest.")
            case Step.EMPTY:
                self._end(
                    copy,
                    f"{copy.problem} What there is of {copy.target} in the guest is incomplete: "
                    "delete it there.",
                )

    def _go_on(self, copy: Copy) -> None:
        """Send the next fragment, or the end, or take it all back."""
        data = b""
        if copy.problem is None and copy.copied < copy.size:
            wanted = min(DATA_FRAGMENT, copy.size - copy.copied)
            try:
                data = copy.read(copy.copied, wanted)
            except OSError as error:
                copy.problem = f"The file cannot be read any further: {error.strerror}."
            else:
                if len(data) < wanted:
                    copy.problem = "The file became shorter while it was copied; copy it again."
        if copy.problem is not None:
            self._ask(copy, Step.CANCEL, plain_body(FileCopyOperation.CANCEL_FCOPY))
        elif data:
            copy.pending = len(data)
            self._ask(copy, Step.WRITE, write_body(copy.copied, data))
        else:
            self._ask(copy, Step.COMPLETE, plain_body(FileCopyOperation.COMPLETE_FCOPY))

    def _ask(self, copy: Copy, step: Step, body: bytes) -> None:
        copy.step, copy.asked_at = step, None
        # A channel that faults over it ends the copy in closed().
        self._conversation.request(body)

    def _end(self, copy: Copy, problem: str | None) -> None:
        self._copy = None
        copy.done(None if problem is None else CopyFailed(problem))
