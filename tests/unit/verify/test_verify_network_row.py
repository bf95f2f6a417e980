"""What row ``network`` makes of the guest's own counters."""

from __future__ import annotations

import pytest

from hvhost.verify.guest import RowFailed
from hvhost.verify.rows.network import check_queues

SAID = """NIC statistics:
     tx_scattered: 12
     tx_no_space: 3
     tx_too_big: 0
     rx_no_memory: 0
     tx_queue_0_packets: 70
     tx_queue_0_bytes: 60000
     rx_queue_0_packets: 40
     rx_queue_0_bytes: 30000
     tx_queue_1_packets: 4
     tx_queue_1_bytes: 40000
     rx_queue_1_packets: 9
     rx_queue_1_bytes: 20000
     cpu0_rx_bytes: 999999
"""


def test_queues_that_add_up() -> None:
    assert check_queues(SAID, 50000, 100000) == 2
    assert check_queues(SAID, 49500, 99000) == 2, "there was a ping between the two"


@pytest.mark.parametrize(
    ("text", "received", "sent", "complaint"),
    [
        (SAID, 45000, 100000, "rx queues have 50000 bytes, its interface 45000"),
        (SAID, 50000, 120000, "tx queues have 100000 bytes, its interface 120000"),
        (SAID.replace("tx_queue", "tx_line"), 50000, 100000, "names no tx queue"),
        (SAID.replace("rx_queue", "rx_line"), 50000, 100000, "names no rx queue"),
        ("no stats available", 0, 0, "names no rx queue"),
        (SAID.replace("too_big: 0", "too_big: 2"), 50000, 100000, "errors: {'tx_too_big': 2}"),
    ],
)
def test_queues_that_do_not(text: str, received: int, sent: int, complaint: str) -> None:
    with pytest.raises(RowFailed, match=complaint):
        check_queues(text, received, sent)
