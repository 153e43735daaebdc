"""What kernels leave in outputs and workspaces, compared with what the oracle found."""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.cuda.layout import NO_POSITION, RowLayout
from tests.kernels.cuda.harness import Answer
from tests.kernels.cuda.oracle import Array, Looked, Pooled

CANARY = 0xEE  # what the harness fills outputs with


def same_bits(got: Array, wanted: Array, rows: RowLayout) -> bool:
    """Return whether values are the same bits.

    Of a float16 that is widened any NaN will do: the conversion makes it a quiet one.
    """
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    bits = f"u{got.itemsize}"
    # Copied first, since an output may begin anywhere.
    equal = got.copy().view(bits) == wanted.copy().view(bits)
    if rows.stored == "float16" and rows.out == "float32":
        equal |= np.isnan(got) & np.isnan(wanted)
    return bool(equal.all())


def check_rows(out: Array, looked: Looked, rows: RowLayout, *, fill: bool) -> None:
    """Compare a query's output; what is not written keeps its canaries."""
    written = looked.hit | fill
    assert same_bits(out[written], looked.rows[written], rows)
    assert (np.ascontiguousarray(out[~written]).view(np.uint8) == CANARY).all()


def check_misses(answer: Answer, n_table: int, keys: Array, looked: Looked) -> None:
    """Compare the misses in a workspace, which are in any order."""
    start, missing = answer.starts[n_table], answer.missing(n_table).astype(np.int64)
    positions = missing[:, 0] - start
    assert sorted(positions.tolist()) == np.flatnonzero(~looked.hit).tolist()
    unique = answer.unique(n_table)
    assert sorted(unique.tolist()) == sorted(looked.unique_missing)
    firsts = missing[:, 1] - start
    assert (unique[answer.numbers(n_table)] == keys[positions]).all()
    assert (keys[firsts] == keys[positions]).all()
    assert len(set(firsts.tolist())) == len(unique)


def check_pooled_misses(answer: Answer, keys: Array, pooled: list[Pooled]) -> None:
    """Compare the misses that a pooled query leaves, which are in any order."""
    layout = answer.work.layout
    block = answer.block[layout.missing : layout.missing + 8 * layout.n_keys]
    noted = block.view(np.uint32).reshape(-1, 2)
    start = answer.work.layout.firsts
    numbers = answer.block[start : start + 4 * layout.n_keys].view(np.uint32)
    first_bag = 0
    for i, found in enumerate(pooled):
        begin, end = answer.starts[i], answer.starts[i + 1]
        bags = noted[begin : begin + len(found.missed), 0] - first_bag
        assert sorted(bags.tolist()) == found.missed
        first_bag += len(found.sums)
        firsts = noted[begin:end, 1].astype(np.int64)
        missed = ~found.looked.hit
        assert (firsts[~missed] == NO_POSITION).all()
        unique = answer.unique(i)
        assert sorted(unique.tolist()) == sorted(found.looked.unique_missing)
        assert (unique[numbers[firsts[missed]]] == keys[begin:end][missed]).all()
        assert (keys[firsts[missed]] == keys[begin:end][missed]).all()


def check_sums(out: Array, pooled: Pooled) -> None:
    """Compare sums, which float32 rounds at every step."""
    exact = pooled.sums
    with np.errstate(invalid="ignore"):
        close = np.abs(out.astype(np.float64) - exact) <= pooled.slack
    close |= out == exact  # infinities
    close |= np.isnan(out) & np.isnan(exact)
    assert close.all(), f"{out[~close][:5]} are not {exact[~close][:5]}"
