"""The switch's rules: who gets a frame, with which tag, and who never does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hvhost.network.switch import (
    ADDRESS_LIMIT,
    AGEING_SECONDS,
    ALL_VLANS,
    DROPPED,
    STORM_BURST,
    PortSettings,
    Switch,
    TokenBucket,
)

A, B, C = (bytes((0, 0x15, 0x5D, 0, 0, number)) for number in (1, 2, 3))
ALL = b"\xff" * 6


def head(to: bytes, sender: bytes, tag: int | None = None) -> bytes:
    middle = b"" if tag is None else b"\x81\x00" + tag.to_bytes(2, "big")
    return (to + sender + middle + b"\x12\x34" + bytes(8))[:18]


def make(*ports: PortSettings) -> Switch:
    switch = Switch()
    for number, port in enumerate(ports):
        switch.add_port(number, port)
    return switch


def test_unknown_is_flooded_and_known_is_not() -> None:
    switch = make(*(PortSettings(name) for name in "abc"))
    assert switch.forward(0, head(B, A), 0.0).plain == (1, 2)
    assert switch.forward(1, head(A, B), 0.0).plain == (0,)
    assert switch.forward(0, head(B, A), 0.0).plain == (1,)
    assert switch.forward(0, head(A, C), 0.0) == DROPPED  # it is where it came from


def test_addresses_age_and_go_with_their_port() -> None:
    switch = make(*(PortSettings(name) for name in "abc"))
    switch.forward(1, head(A, B), 0.0)
    assert switch.forward(0, head(B, A), AGEING_SECONDS - 1).plain == (1,)
    assert switch.forward(0, head(B, A), AGEING_SECONDS + 1).plain == (1, 2)
    switch.remove_port(1)
    assert (0, B) not in switch.addresses


def test_the_table_is_bounded() -> None:
    switch = make(PortSettings("a"), PortSettings("b"))
    for number in range(ADDRESS_LIMIT + 100):
        switch.forward(0, head(ALL, b"\0" + number.to_bytes(5, "big")), float(number))
    assert len(switch.addresses) == ADDRESS_LIMIT
    assert (0, bytes(6)) not in switch.addresses


def test_an_address_that_moves_is_behind_one_port() -> None:
    switch = make(*(PortSettings(name) for name in "abc"))
    switch.forward(0, head(ALL, A), 0.0)
    switch.forward(1, head(ALL, A), 1.0)
    assert switch.forward(2, head(A, C), 1.0).plain == (1,)
    switch.remove_port(0)
    assert switch.addresses == {(0, A): 1, (0, C): 2}
    switch.remove_port(1)
    assert switch.addresses == {(0, C): 2}


@given(st.lists(st.tuples(st.sampled_from([None, 10, 20]), st.integers(0, 30)), max_size=60))
def test_who_spoofs_pushes_out_nobody_elses_address(frames: list[tuple[int | None, int]]) -> None:
    switch, limit = Switch(), 3
    switch.add_port(0, PortSettings("spoofs", vlan=30, trunk=frozenset({10, 20})), limit)
    switch.add_port(1, PortSettings("ten", vlan=10), limit)
    switch.add_port(2, PortSettings("trunk", vlan=30, trunk=frozenset({10, 20})), limit)
    theirs = {}
    for number in range(limit):
        mac = bytes((0, 0x15, 0x5D, 1, 1, number))
        switch.forward(1, head(ALL, mac), 0.0)
        theirs[10, mac] = 1
        mac = bytes((0, 0x15, 0x5D, 1, 2, number))
        vlan = (10, 20, 30)[number]
        switch.forward(2, head(ALL, mac, None if vlan == 30 else vlan), 0.0)
        theirs[vlan, mac] = 2
    for tag, number in frames:
        switch.forward(0, head(ALL, bytes((2, 0, 0, 0, 0, number)), tag), 1.0)
        own = {key: port for key, port in switch.addresses.items() if port == 0}
        assert len(own) <= limit
        assert {key: port for key, port in switch.addresses.items() if port} == theirs
    for _, mac in theirs:
        if (10, mac) in theirs:
            decision = switch.forward(0, head(mac, A, 10), 2.0)
            assert decision.plain + decision.tagged == (theirs[10, mac],), "it is not flooded"


def test_access_trunk_and_native() -> None:
    switch = make(
        PortSettings("ten", vlan=10),
        PortSettings("ten too", vlan=10),
        PortSettings("twenty", vlan=20),
        PortSettings("trunk", vlan=99, trunk=frozenset({10, 20})),
        PortSettings("uplink", trunk=ALL_VLANS),
    )
    assert switch.forward(0, head(ALL, A), 0.0) == ((1,), (3, 4), 10, False)
    assert switch.forward(3, head(ALL, B, 0xA000 | 20), 0.0) == ((2,), (4,), 0xA000 | 20, True)
    assert switch.forward(3, head(ALL, B), 0.0) == ((), (4,), 99, False)
    assert switch.forward(3, head(ALL, B, 30), 0.0) == DROPPED
    assert switch.forward(0, head(ALL, A, 10), 0.0) == DROPPED
    assert switch.forward(4, head(ALL, C), 0.0) == DROPPED  # nobody else is in that of no tag
    assert switch.forward(4, head(ALL, C, 99), 0.0) == ((3,), (), 99, True)


def test_isolated_ports_reach_others_only() -> None:
    alone = [PortSettings(name, isolated=True) for name in "ab"]
    switch = make(*alone, PortSettings("router"))
    assert switch.forward(0, head(ALL, A), 0.0).plain == (2,)
    assert switch.forward(2, head(ALL, C), 0.0).plain == (0, 1)
    switch.forward(1, head(ALL, B), 0.0)
    assert switch.forward(0, head(B, A), 0.0).plain == ()


def test_a_storm_is_cut_off_and_other_ports_are_not() -> None:
    switch = make(PortSettings("a"), PortSettings("b"))
    passed = sum(bool(switch.forward(0, head(ALL, A), 1.0).plain) for _ in range(10_000))
    assert passed == STORM_BURST and switch.suppressed == 10_000 - STORM_BURST
    assert switch.forward(1, head(A, B), 1.0).plain == (0,)


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 500)), max_size=60))
def test_a_bucket_never_lets_more_through_than_its_rate(steps: list[tuple[float, float]]) -> None:
    bucket, now, passed = TokenBucket(100.0, 50.0), 0.0, 0.0
    for pause, amount in steps:
        now += pause
        if bucket.take(amount, now):
            passed += amount
        assert passed <= 50.0 + 100.0 * now + 1e-6


PORTS = st.lists(
    st.builds(
        PortSettings,
        name=st.just("p"),
        vlan=st.sampled_from([0, 10, 20]),
        trunk=st.frozensets(st.sampled_from([10, 20, 30])),
        isolated=st.booleans(),
    ),
    min_size=2,
    max_size=6,
)


@given(PORTS, st.lists(st.tuples(st.integers(0, 5), st.binary(max_size=40)), max_size=40))
def test_no_frame_leaves_its_vlan_returns_or_joins_the_isolated(
    ports: list[PortSettings], frames: list[tuple[int, bytes]]
) -> None:
    switch = make(*ports)
    for number, data in frames:
        number %= len(ports)
        decision = switch.forward(number, data[:18], 0.0)
        vlan = decision.tag & 0xFFF
        assert number not in decision.plain + decision.tagged
        for target in decision.plain + decision.tagged:
            assert not (ports[number].isolated and ports[target].isolated)
            assert vlan in ({ports[target].vlan} | ports[target].trunk)
            assert vlan in ({ports[number].vlan} | ports[number].trunk)
        assert all(ports[target].vlan == vlan for target in decision.plain)
        assert all(vlan in ports[target].trunk for target in decision.tagged)
