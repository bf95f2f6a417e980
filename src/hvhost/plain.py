"""Dataclasses as JSON: what one process of a machine writes for another to read.

Written by hand because a general library would cost a tenth of a worker's start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from enum import Enum
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints
from uuid import UUID


def dump(value: Any) -> str:
    """JSON of a dataclass made of dataclasses, tuples, enumerations, UUIDs and JSON's types."""
    return json.dumps(asdict(value), default=_simple)


def build(kind: Any, value: Any, names: Mapping[str, type] | None = None) -> Any:
    """*value*, of JSON's types, as a *kind*; an error of its kind if it is none.

    *names* are types that dataclasses name without importing them.
    """
    if get_origin(kind) in (Union, UnionType):
        if value is None:
            return None
        kind = next(each for each in get_args(kind) if each is not type(None))
    if get_origin(kind) is tuple:
        return tuple(build(get_args(kind)[0], each, names) for each in value)
    if isinstance(kind, type):
        if is_dataclass(kind):
            hints = get_type_hints(kind, localns=names)
            return kind(**{name: build(hints[name], each, names) for name, each in value.items()})
        if issubclass(kind, Enum | UUID):
            return kind(value)
    return value


def _simple(value: object) -> str:
    if isinstance(value, UUID):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not written as JSON")
