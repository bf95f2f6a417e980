"""A machine's configuration as JSON, for the worker to read.

Written by hand because a general library would cost a tenth of the worker's start.
"""

from __future__ import annotations

import json
from dataclasses import asdict, is_dataclass
from enum import Enum
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hvhost.machine.config import MachineConfig
from hvhost.machine.storage_model import DriveConfig, FibreChannelConfig
from hvhost.network.config import AdapterConfig

FAMILIES = {each.__name__: each for each in (AdapterConfig, DriveConfig, FibreChannelConfig)}
"""Types that a configuration names without importing them."""


def dump_config(config: MachineConfig) -> str:
    """JSON of *config*."""
    return json.dumps(asdict(config), indent=1) + "\n"


def load_config(text: str) -> MachineConfig:
    """What :func:`dump_config` wrote; an error of its kind if it is not."""
    config = _build(MachineConfig, json.loads(text))
    assert isinstance(config, MachineConfig)
    return config


def _build(kind: Any, value: Any) -> Any:
    """*value*, of JSON's types, as a *kind*: a dataclass, tuple, enumeration, or optional."""
    if get_origin(kind) in (Union, UnionType):
        if value is None:
            return None
        kind = next(each for each in get_args(kind) if each is not type(None))
    if get_origin(kind) is tuple:
        return tuple(_build(get_args(kind)[0], each) for each in value)
    if isinstance(kind, type):
        if is_dataclass(kind):
            hints = get_type_hints(kind, localns=FAMILIES)
            return kind(**{name: _build(hints[name], each) for name, each in value.items()})
        if issubclass(kind, Enum):
            return kind(value)
    return value
