"""Choices that command lines offer, apart from the model so that `--help` is quick."""

from __future__ import annotations

from enum import StrEnum


class KvpPool(StrEnum):
    """``enum hv_kvp_exchg_pool``, by names for people.

    ``external``: what the host's administrator gives the guest. ``guest``: what the guest tells the
    host. ``auto``: what the guest's daemon says of its system. ``auto-external``: what the host
    says of itself. ``auto-internal``: kept by the guest for itself.
    """

    EXTERNAL = "external"
    GUEST = "guest"
    AUTO = "auto"
    AUTO_EXTERNAL = "auto-external"
    AUTO_INTERNAL = "auto-internal"

    @property
    def number(self) -> int:
        """The pool's number in messages and in the name of the guest's file."""
        return _KVP_POOLS.index(self)


_KVP_POOLS = tuple(KvpPool)


class Transport(StrEnum):
    """Which KVM runs the virtual processors."""

    AUTO = "auto"
    LOCAL = "local"
    RIG = "rig"
