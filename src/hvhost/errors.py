"""The one error hierarchy.

Every message says, in one sentence, what happened, to what, and what to do about it. The command
line prints ``str(error)`` and nothing else, so a message must stand on its own.
"""

from __future__ import annotations


class HvHostError(Exception):
    """Anything hvhost reports to a person: bad input, a missing ability, a failed machine."""


class LocalProtocolError(HvHostError):
    """Our own code asked a protocol module for something its state forbids: a bug of ours."""


class RemoteProtocolError(HvHostError):
    """The guest sent something its protocol forbids; faults one channel, never the machine."""


class GuestMemoryError(RemoteProtocolError):
    """The guest named memory that it does not have."""


class DiskError(HvHostError):
    """A virtual disk that is damaged, or of a kind that cannot be used."""
