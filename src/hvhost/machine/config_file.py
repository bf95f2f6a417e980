"""A machine's configuration as JSON, for the worker to read."""

from __future__ import annotations

import json
from dataclasses import asdict

from hvhost.machine.config import MachineConfig
from hvhost.machine.storage_model import DriveConfig, FibreChannelConfig
from hvhost.network.config import AdapterConfig
from hvhost.plain import build

FAMILIES = {each.__name__: each for each in (AdapterConfig, DriveConfig, FibreChannelConfig)}
"""Types that a configuration names without importing them."""


def dump_config(config: MachineConfig) -> str:
    """JSON of *config*."""
    return json.dumps(asdict(config), indent=1) + "\n"


def load_config(text: str) -> MachineConfig:
    """What :func:`dump_config` wrote; an error of its kind if it is not."""
    config = build(MachineConfig, json.loads(text), FAMILIES)
    assert isinstance(config, MachineConfig)
    return config
