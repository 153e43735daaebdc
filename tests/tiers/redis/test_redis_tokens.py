"""Which numbers become tokens, against plain Python that remembers everything."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hps_numba.tiers.redis.tokens import At, Tokens, parsed
from hps_numba.types import Position

NONE = -1
START = (0, 0)


@dataclass
class Oracle:
    """All numbers of one partition that a server saw, and where its lower tier is."""

    seen: list[tuple[int, dict[int, At]]] = field(default_factory=list)
    lower: dict[int, At] = field(default_factory=dict)

    def sound(self) -> list[int]:
        """Return the numbers that may be tokens now."""
        return [number for number, stored in self.seen if self.has(stored)]

    def has(self, stored: dict[int, At]) -> bool:
        """Whether the lower tier is as far as this."""
        return all(self.lower.get(p, START) >= at for p, at in stored.items())


places = st.sampled_from([(0, 0), (1, 0), (1, 7), (2, 0), (10, 0), (1 << 60, 3)])
stored = st.dictionaries(st.sampled_from([0, 1, 11]), places, max_size=3)
steps = st.one_of(
    st.tuples(st.just("see"), stored),
    st.tuples(st.just("reach"), st.sampled_from([0, 1, 11]), places),
)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(given_steps=st.lists(steps, max_size=20))
def test_a_token_is_a_number_whose_positions_the_lower_tier_has(
    given_steps: list[tuple[Any, ...]],
) -> None:
    tokens, oracle = Tokens(2), Oracle()
    for number, (name, *arguments) in enumerate(given_steps):
        before = tokens.all()[1]
        if name == "see":
            oracle.seen.append((number, arguments[0]))
            tokens.see(1, number, arguments[0])
        else:
            partition, at = arguments
            oracle.lower[partition] = max(at, oracle.lower.get(partition, at))
            tokens.reach(partition, Position(*at))
        token = tokens.all()[1]
        assert token in [NONE, *oracle.sound()]
        assert token >= before
        if name == "see" and oracle.has(arguments[0]):
            assert token == number
        if all(oracle.has(positions) for _, positions in oracle.seen) and oracle.seen:
            assert token >= oracle.seen[0][0]  # it is not left without one
    assert tokens.all()[0] == NONE


def test_a_server_that_always_lags_a_little_has_tokens() -> None:
    tokens = Tokens(1)
    for n in range(10):
        tokens.see(0, n, {0: (n + 2, 0)})
        tokens.reach(0, Position(n))
    assert tokens.all()[0] > 2


def test_positions_that_are_nearer_are_waited_for_instead() -> None:
    tokens = Tokens(1)
    tokens.see(0, 1, {0: (1000, 0), 1: (5, 0)})
    tokens.see(0, 2, {0: (1000, 0), 1: (6, 0)})  # beyond
    tokens.see(0, 3, {0: (3, 0)})  # others began the stream again
    tokens.reach(0, Position(3))
    assert tokens.all() == (3,)


def test_where_the_lower_tier_is_may_be_set_backwards() -> None:
    tokens = Tokens(1)
    tokens.reach(0, Position(10))
    tokens.seek({0: Position(4)})
    tokens.see(0, 1, {0: (5, 0)})
    assert tokens.all() == (NONE,)
    tokens.reach(0, Position(3))  # what was repeated takes nothing away
    tokens.reach(0, Position(4, 9))
    assert tokens.all() == (NONE,)
    tokens.reach(0, Position(5))
    assert tokens.all() == (1,)


def test_a_smaller_number_takes_no_token_away() -> None:
    """A replica that took over may give one; the script then sees what was lost."""
    tokens = Tokens(1)
    tokens.see(0, 9, {})
    tokens.see(0, 8, {})
    assert tokens.all() == (9,)


def test_a_partition_without_a_stream_gives_tokens_at_once() -> None:
    tokens = Tokens(2)
    tokens.see(1, 7, {})
    assert tokens.all() == (NONE, 7)


def test_positions_are_read_as_they_are_written() -> None:
    assert parsed(b"") == {}
    assert parsed(b" 3=5:2 13=1152921504606846976:0") == {3: (5, 2), 13: (1 << 60, 0)}
    for text in (b" 3", b"x=1:0", b" 3=1:y"):
        with pytest.raises(ValueError, match="invalid literal"):
            parsed(text)
