"""What is said of drives before there are any."""

from __future__ import annotations

import pytest

from hvhost.errors import HvHostError
from hvhost.machine.storage_model import FibreChannelConfig

NAME = "c003ff0123456789"


def test_names_on_a_fabric() -> None:
    FibreChannelConfig(NAME, "50014380186b1c2d").check()


@pytest.mark.parametrize(
    "wrong",
    ["", NAME[:-1], NAME + "0", NAME + "\n", NAME.upper(), "0x" + NAME[2:], "c0:03:ff:01:23:45:67"],
)
def test_what_is_no_world_wide_name(wrong: str) -> None:
    for names in ((wrong, NAME), (NAME, wrong)):
        with pytest.raises(HvHostError, match="is no world-wide name; write it like"):
            FibreChannelConfig(*names).check()
