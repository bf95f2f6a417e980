"""One route of a worker's API. A device family's routes are in its own ``machine/*_api.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from hvhost.machine.model import LiveMachine


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request without parameters."""


class WaitQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Waits up to ``timeout`` seconds."""

    timeout: Annotated[float, msgspec.Meta(ge=0, le=300, description="seconds to wait")] = 0.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One route: *call* gets the machine and the decoded parameters, in a thread of its own.

    Parameters of a GET come from the query, those of a POST from the JSON body. Where the machine
    has the devices of *family* in another process, *call* is made there.
    """

    method: str
    path: str
    name: str
    summary: str
    call: Callable[[LiveMachine, Any], object]
    parameters: type = Nothing
    result: Any = None
    family: str = ""
