"""A machine's configuration comes out of its file as it went in."""

from __future__ import annotations

from typing import get_type_hints

from hypothesis import given
from hypothesis import strategies as st

from hvhost.machine.config_file import FAMILIES, dump_config, load_config
from hvhost.machine.model import MachineConfig

FIELDS = get_type_hints(MachineConfig, localns=FAMILIES)


@given(st.builds(MachineConfig, **{name: st.from_type(kind) for name, kind in FIELDS.items()}))
def test_round_trip(config: MachineConfig) -> None:
    assert load_config(dump_config(config)) == config
