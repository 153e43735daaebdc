from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from hps_numba.runtime.chunk import Chunk, Turn
from hps_numba.runtime.hierarchy import Hierarchy
from hps_numba.runtime.pipeline import BUFFERS, Pipeline
from hps_numba.types import FailureMode, Keys, Mask, Rows, TableSpec
from tests.oracle import versioned_rows, versions_in
from tests.runtime.histories import LowerTier

SPEC = TableSpec("model", "table", 4)
N_KEYS, CHUNK_KEYS = 1000, 96


class TellingTier(LowerTier):
    """Stays with its first chunk, all asked for, until the second is asked for."""

    in_turn = True

    def __init__(self) -> None:
        super().__init__()
        self.n_asked = 0
        self.second = threading.Event()

    def fetch_and_tell(
        self, tag: str, keys: Keys, out: Rows, found: Mask, asked: Callable[[], None]
    ) -> int:
        self.n_asked += 1
        if self.n_asked == 1:
            asked()
            assert self.second.wait(10)
        self.second.set()
        return super().fetch(tag, keys, out, found)


def test_the_next_chunk_is_asked_for_when_nothing_is_left_to_ask_of_the_last() -> None:
    above, below = TellingTier(), LowerTier()
    keys = np.arange(N_KEYS, dtype=np.int64)
    for tier, some in ((above, keys[::2].copy()), (below, keys)):
        tier.open_table(SPEC)
        tier.insert(SPEC.tag, some, versioned_rows(some, 1, SPEC.dim))
    table = Hierarchy(
        SPEC,
        [above, below],
        backfills=None,
        on_failure=FailureMode.RAISE,
        write_rows=64,
    )
    chunks = [chunk_of(keys[i : i + CHUNK_KEYS]) for i in range(0, N_KEYS, CHUNK_KEYS)]
    with ThreadPoolExecutor(BUFFERS) as executor:
        Pipeline(executor).run([(table, chunk) for chunk in chunks])
    assert above.n_asked == len(chunks)
    assert all((versions_in(c.keys, c.out) == 1).all() for c in chunks)


def chunk_of(keys: Keys) -> Chunk:
    out = np.zeros((keys.size, SPEC.dim), np.float32)
    return Chunk(keys, out, np.zeros(keys.size, np.bool_))


def test_a_turn_is_passed_on_once() -> None:
    turns = threading.Lock()
    mine, theirs = Turn(turns), Turn(turns)
    with mine:
        mine.pass_on()
        with theirs:
            mine.pass_on()
            assert turns.locked()
        assert not turns.locked()
    assert not turns.locked()


def test_a_turn_ends_with_what_fails() -> None:
    turns = threading.Lock()
    try:
        with Turn(turns):
            raise OSError
    except OSError:
        assert not turns.locked()


def test_a_chunk_without_a_turn_passes_none_on() -> None:
    chunk = chunk_of(np.zeros(0, np.int64))
    chunk.turn.pass_on()
    with chunk.turn:
        chunk.turn.pass_on()
