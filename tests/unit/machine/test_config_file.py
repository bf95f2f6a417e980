"""A machine's configuration comes out of its file as it went in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hvhost.machine.config_file import dump_config, load_config
from hvhost.machine.model import MachineConfig


@given(st.builds(MachineConfig))
def test_round_trip(config: MachineConfig) -> None:
    assert load_config(dump_config(config)) == config
