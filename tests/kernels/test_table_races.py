"""Compiled readers and writers that meet in one slot, millions of times."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from numba import njit

from hps_numba.kernels.host import table as kernel
from hps_numba.kernels.host import table_write as writing
from hps_numba.kernels.host.memory import load_acquire, store_release
from tests.kernels.bare_table import Bare, colliding_keys

ROUNDS = 2_000_000
LEAST_HITS = 1_000  # of the reader, before the writer stops
DONE, HITS = 0, 8  # addresses in the words that both threads know


@njit(nogil=True)
def write_in_turns(desc, state, free, limits, keys, words, keep, shared):
    """Insert one key after the other; ``keep`` says whether those before stay.

    A row is the key, the version, and ``key ^ version`` as often as it takes.
    """
    rows = words.view(np.uint8)
    order = np.empty(1, np.int64)
    for version in range(1, 1_000 * ROUNDS):
        if version > ROUNDS and load_acquire(shared + HITS) > LEAST_HITS:
            break
        i = version % keys.size
        order[0] = i
        words[i] = keys[i] ^ version
        words[i, 0], words[i, 1] = keys[i], version
        writing.upsert_rows(
            desc, 0, state, free, keys, rows, order, limits, kernel.RANDOM, 0
        )
        if not keep:
            writing.remove_keys(desc, 0, state, free, keys, order)
    store_release(shared + DONE, 1)


@njit(nogil=True)
def read_until(desc, keys, words, shared):
    """Return hits, rows that are not whole or not of their key, steps back."""
    out = words.view(np.uint8)
    found = np.zeros(keys.size, np.bool_)
    newest = np.zeros(keys.size, np.int64)
    hits, broken, back = 0, 0, 0
    while not load_acquire(shared + DONE):
        found[:] = False
        kernel.fetch_rows(desc, keys, out, found, 0, keys.size, kernel.RANDOM, 0)
        for i in range(keys.size):
            if not found[i]:
                continue
            hits += 1
            key, version = words[i, 0], words[i, 1]
            whole = key == keys[i]
            for word in words[i, 2:]:
                whole &= word == key ^ version
            broken += not whole
            back += version < newest[i]
            newest[i] = version
        store_release(shared + HITS, hits)
    return hits, broken, back


@pytest.mark.parametrize("keep", [True, False], ids=["updates", "removals"])
@pytest.mark.parametrize(("n_keys", "row_words"), [(1, 200), (2, 3), (5, 40)])
def test_rows_are_whole_and_of_their_key_however_slots_are_reused(
    n_keys, row_words, keep
):
    """Removed keys leave their slot, and each row its place, to the next key."""
    bare = Bare(row_bytes=8 * row_words)
    bare.partition.add_segment()
    bare.partition.describe(bare.descriptor[0])
    keys = colliding_keys(n_keys, slot=7)
    p = bare.partition
    shared = np.zeros(2, np.int64)
    results = []

    def read() -> None:
        results.append(
            read_until(
                bare.descriptor,
                keys,
                np.zeros((n_keys, row_words), np.int64),
                shared.ctypes.data,
            )
        )

    reader = threading.Thread(target=read)
    reader.start()
    write_in_turns(
        bare.descriptor,
        p.state,
        p.free,
        p.limits,
        keys,
        np.zeros((n_keys, row_words), np.int64),
        keep,
        shared.ctypes.data,
    )
    reader.join()
    ((hits, broken, back),) = results
    assert hits > LEAST_HITS
    assert (broken, back) == (0, 0)
    assert bare.size == (n_keys if keep else 0)
