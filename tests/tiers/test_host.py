from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from hps_numba.errors import ClosedError, ConfigError, UnknownTableError
from hps_numba.tiers.host import HostTier
from hps_numba.types import OverflowPolicy, RowBlock, RowDtype, TableSpec

SPEC = TableSpec("model", "table", dim=4)
TAG = SPEC.tag
INT64 = np.iinfo(np.int64)


@pytest.fixture(params=list(OverflowPolicy), ids=lambda policy: policy.value)
def tier(request) -> Iterator[HostTier]:
    with closing(HostTier(overflow_policy=request.param)) as tier:
        tier.open_table(SPEC)
        yield tier


def random_rows(spec: TableSpec, n: int, seed: int = 0) -> np.ndarray:
    """Return rows of any bits at all, NaNs with payload among them."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 256, (n, spec.row_bytes), dtype=np.uint8)
    return words.view(spec.numpy_dtype)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.array_equal(a.view(np.uint8), b.view(np.uint8)))


def some_keys(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(INT64.min, INT64.max, n)


def fetch(tier: HostTier, spec: TableSpec, keys: np.ndarray):
    out = np.zeros((keys.size, spec.dim), spec.numpy_dtype)
    found = np.zeros(keys.size, np.bool_)
    assert tier.fetch(spec.tag, keys, out, found) == np.count_nonzero(found)
    return out, found


@pytest.mark.parametrize("dtype", list(RowDtype), ids=lambda dtype: dtype.value)
@pytest.mark.parametrize("dim", [1, 2, 3, 7, 8, 16, 33, 128, 129, 256, 1_000])
@pytest.mark.parametrize("policy", list(OverflowPolicy), ids=lambda p: p.value)
def test_rows_come_back_bit_by_bit(dim, dtype, policy):
    spec = TableSpec("model", "table", dim, dtype)
    keys = np.append(some_keys(700), [INT64.min, INT64.max, -1, 0])
    rows = random_rows(spec, keys.size)
    with closing(HostTier(num_partitions=3, overflow_policy=policy)) as tier:
        tier.open_table(spec)
        tier.insert(spec.tag, keys, rows)
        out, found = fetch(tier, spec, keys)
        assert found.all()
        assert same_bits(out, rows)
        newer = random_rows(spec, 100, seed=1)
        tier.insert(spec.tag, keys[:100], newer)
        out, found = fetch(tier, spec, keys)
        assert found.all()
        assert same_bits(out[:100], newer)
        assert same_bits(out[100:], rows[100:])


def test_repeated_keys_each_get_the_row(tier):
    keys = some_keys(300)
    rows = random_rows(SPEC, 300)
    tier.insert(TAG, keys, rows)
    asked = np.random.default_rng(3).integers(0, 300, 5_000)
    out, found = fetch(tier, SPEC, keys[asked])
    assert found.all()
    assert same_bits(out, rows[asked])


def test_found_keys_are_skipped_and_absent_ones_left_alone(tier):
    keys = some_keys(1_000)
    rows = random_rows(SPEC, 1_000)
    tier.insert(TAG, keys[:600], rows[:600])
    known = np.random.default_rng(1).random(1_000) < 0.5
    found = known.copy()
    before = random_rows(SPEC, 1_000, seed=9)
    out = before.copy()
    there = np.arange(1_000) < 600
    assert tier.fetch(TAG, keys, out, found) == np.count_nonzero(there & ~known)
    np.testing.assert_array_equal(found, there | known)
    written = there & ~known
    assert same_bits(out[written], rows[written])
    assert same_bits(out[~written], before[~written])


@pytest.mark.parametrize("n_threads", [2, 3])
def test_a_fetch_over_threads_equals_one_alone(n_threads):
    keys = some_keys(60_000)
    rows = random_rows(SPEC, keys.size)
    asked = keys[np.random.default_rng(4).integers(0, keys.size, 110_001)]
    with (
        closing(HostTier()) as alone,
        closing(HostTier(num_threads=n_threads)) as several,
    ):
        results = []
        for tier in (alone, several):
            tier.open_table(SPEC)
            tier.insert(TAG, keys[::2].copy(), rows[::2].copy())
            out = random_rows(SPEC, asked.size, seed=7)
            found = np.random.default_rng(5).random(asked.size) < 0.2
            results.append((tier.fetch(TAG, asked, out, found), out, found))
    (hits, out, found), (hits_too, out_too, found_too) = results
    assert hits == hits_too > 0
    np.testing.assert_array_equal(found, found_too)
    assert same_bits(out, out_too)


def test_read_only_and_unaligned_keys_and_rows_are_taken(tier, tmp_path):
    keys = some_keys(500)
    rows = random_rows(SPEC, 500)
    keys.tofile(tmp_path / "key")
    rows.tofile(tmp_path / "emb_vector")
    mapped_keys = np.memmap(tmp_path / "key", np.int64, "r")
    mapped_rows = np.memmap(tmp_path / "emb_vector", np.float32, "r").reshape(-1, 4)
    odd_keys = np.frombuffer(b"x" + keys.tobytes(), np.uint8)[1:].view(np.int64)
    odd_rows = np.frombuffer(b"x" + rows.tobytes(), np.uint8)[1:].view(np.float32)
    assert not odd_keys.flags.aligned
    for given_keys, given_rows in (
        (mapped_keys, mapped_rows),
        (odd_keys, odd_rows.reshape(-1, 4)),
    ):
        tier.insert(TAG, given_keys, given_rows)
        out, found = fetch(tier, SPEC, given_keys)
        assert found.all()
        assert same_bits(out, rows)
        assert tier.delete(TAG, given_keys) == 500
        epoch = tier.epoch(TAG)
        assert tier.backfill(TAG, given_keys, given_rows, epoch) == 500
        assert tier.evict(TAG, given_keys) == 500
        assert tier.load(TAG, [RowBlock(given_keys, given_rows)]) == 500
        assert same_bits(fetch(tier, SPEC, keys)[0], rows)
        with tier.hold(TAG, given_keys):
            pass


def test_one_code_is_compiled_for_writable_and_read_only_keys(tier):
    from hps_numba.kernels.host import table, table_write

    keys = some_keys(10)
    tier.insert(TAG, keys, random_rows(SPEC, 10))
    fetch(tier, SPEC, keys)
    tier.delete(TAG, keys)
    functions = (table.fetch_rows, table_write.upsert_rows, table_write.remove_keys)
    before = [len(function.signatures) for function in functions]
    keys.flags.writeable = False
    tier.insert(TAG, keys, random_rows(SPEC, 10))
    assert fetch(tier, SPEC, keys)[1].all()
    tier.delete(TAG, keys)
    assert [len(function.signatures) for function in functions] == before


def test_what_is_stored_is_a_copy(tier):
    keys = np.arange(10)
    rows = random_rows(SPEC, 10)
    expected = rows.copy()
    tier.insert(TAG, keys, rows)
    rows[:] = 0
    out, _ = fetch(tier, SPEC, keys)
    assert same_bits(out, expected)


BAD_KEYS = {
    "strided": np.arange(20)[::2],
    "two-dimensional": np.arange(10).reshape(10, 1),
    "int32": np.arange(10, dtype=np.int32),
    "uint64": np.arange(10, dtype=np.uint64),
    "float": np.arange(10.0),
    "big-endian": np.arange(10).astype(">i8"),
}


@pytest.mark.parametrize("keys", BAD_KEYS.values(), ids=BAD_KEYS.keys())
def test_keys_of_another_kind_are_refused_everywhere(tier, keys):
    rows = random_rows(SPEC, 10)
    kept = np.arange(100, 110)
    tier.insert(TAG, kept, rows)
    out, found = np.zeros((10, 4), np.float32), np.zeros(10, np.bool_)
    epoch = tier.epoch(TAG)

    def hold() -> None:
        with tier.hold(TAG, keys):
            pass

    for call in (
        lambda: tier.fetch(TAG, keys, out, found),
        lambda: tier.insert(TAG, keys, rows),
        lambda: tier.delete(TAG, keys),
        lambda: tier.evict(TAG, keys),
        lambda: tier.backfill(TAG, keys, rows, epoch),
        lambda: tier.load(TAG, [RowBlock(keys, rows)]),
        hold,
    ):
        with pytest.raises(ValueError, match=f"table {TAG}: keys are int64"):
            call()
    assert tier.epoch(TAG) == epoch
    assert same_bits(fetch(tier, SPEC, kept)[0], rows)
    assert tier.size(TAG) == 10


BAD_ROWS = {
    "strided": np.zeros((10, 8), np.float32)[:, ::2],
    "transposed": np.zeros((4, 10), np.float32).T,
    "too few": np.zeros((9, 4), np.float32),
    "too wide": np.zeros((10, 5), np.float32),
    "flat": np.zeros(40, np.float32),
    "float64": np.zeros((10, 4)),
    "float16": np.zeros((10, 4), np.float16),
}


@pytest.mark.parametrize("rows", BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_rows_of_another_kind_are_refused_everywhere(tier, rows):
    keys = np.arange(10)
    found = np.zeros(10, np.bool_)
    for call in (
        lambda: tier.fetch(TAG, keys, rows, found),
        lambda: tier.insert(TAG, keys, rows),
        lambda: tier.backfill(TAG, keys, rows, tier.epoch(TAG)),
        lambda: tier.load(TAG, [RowBlock(keys, rows)]),
    ):
        with pytest.raises(ValueError, match=rf"{TAG}: rows of 10 keys .*\(10, 4\)"):
            call()
    assert tier.size(TAG) == 0


@pytest.mark.parametrize(
    "found",
    [
        np.zeros(9, np.bool_),
        np.zeros(10, np.uint8),
        np.zeros(20, np.bool_)[::2],
        np.zeros((10, 1), np.bool_),
    ],
    ids=["short", "uint8", "strided", "two-dimensional"],
)
def test_a_mask_of_another_kind_is_refused(tier, found):
    tier.insert(TAG, np.arange(10), random_rows(SPEC, 10))
    out = np.zeros((10, 4), np.float32)
    with pytest.raises(ValueError, match=f"{TAG}: found is contiguous bool"):
        tier.fetch(TAG, np.arange(10), out, found)
    assert not out.any()


@pytest.mark.parametrize("which", ["out", "found"])
def test_outputs_that_are_read_only_are_refused_and_not_written(tier, which):
    tier.insert(TAG, np.arange(10), np.ones((10, 4), np.float32))
    outputs = {"out": np.zeros((10, 4), np.float32), "found": np.zeros(10, np.bool_)}
    outputs[which].flags.writeable = False
    with pytest.raises(ValueError, match=f"{TAG}: .* read-only"):
        tier.fetch(TAG, np.arange(10), **outputs)
    assert not outputs["out"].any()
    assert not outputs["found"].any()


def test_a_column_of_one_value_per_row_is_taken_though_its_strides_are_odd():
    spec = TableSpec("model", "narrow", dim=1)
    rows = np.arange(6, dtype=np.float32).reshape(1, 6).T  # contiguous all the same
    assert rows.flags.c_contiguous
    with closing(HostTier()) as tier:
        tier.open_table(spec)
        tier.insert(spec.tag, np.arange(6), rows)
        out = np.zeros((1, 6), np.float32).T
        found = np.zeros(6, np.bool_)
        assert tier.fetch(spec.tag, np.arange(6), out, found) == 6
        assert out.ravel().tolist() == [0, 1, 2, 3, 4, 5]


def test_no_keys_are_no_work(tier):
    none, no_rows = np.empty(0, np.int64), np.empty((0, 4), np.float32)
    tier.insert(TAG, none, no_rows)
    assert tier.fetch(TAG, none, no_rows, np.empty(0, np.bool_)) == 0
    assert tier.delete(TAG, none) == 0
    assert tier.evict(TAG, none) == 0
    assert tier.backfill(TAG, none, no_rows, tier.epoch(TAG)) == 0
    assert tier.size(TAG) == 0
    assert list(tier.iterate(TAG)) == []


def test_a_table_may_be_opened_again_with_the_same_shape_only(tier):
    tier.insert(TAG, np.arange(5), np.ones((5, 4), np.float32))
    tier.open_table(SPEC)
    assert tier.size(TAG) == 5
    for other in (
        TableSpec("model", "table", 5),
        TableSpec("model", "table", 4, RowDtype.FLOAT16),
    ):
        with pytest.raises(ConfigError, match=r"table hps_et.model.table .* dim 4"):
            tier.open_table(other)
    assert tier.size(TAG) == 5


def test_tables_of_models_do_not_mix(tier):
    other = TableSpec("model2", "table", dim=4)
    dotted = TableSpec("model.x", "table", dim=4)
    for i, spec in enumerate((other, dotted)):
        tier.open_table(spec)
        tier.insert(spec.tag, np.arange(3), np.full((3, 4), i + 1, np.float32))
    tier.insert(TAG, np.arange(3), np.zeros((3, 4), np.float32))
    assert tier.tables("model") == ["table"]
    assert tier.tables("model2") == ["table"]
    assert tier.tables("model.x") == ["table"]
    assert (fetch(tier, other, np.arange(3))[0] == 1).all()
    tier.drop_table(other.tag)
    with pytest.raises(UnknownTableError, match=other.tag):
        tier.size(other.tag)
    assert (fetch(tier, dotted, np.arange(3))[0] == 2).all()
    assert (fetch(tier, SPEC, np.arange(3))[0] == 0).all()


def test_a_closed_tier_says_so_also_to_fetches_over_threads():
    keys = np.arange(50_000)
    with closing(HostTier(num_threads=2)) as tier:
        tier.open_table(SPEC)
        table = tier._tables[TAG]
        tier.close()
        for call in (
            lambda: fetch(tier, SPEC, keys),
            lambda: tier.open_table(SPEC),
            lambda: tier.tables("model"),
            lambda: tier.drop_table(TAG),
        ):
            with pytest.raises(ClosedError):
                call()
        tier._tables[TAG] = table  # a fetch that found its table before the close
        with pytest.raises(ClosedError):
            fetch(tier, SPEC, keys)
        tier.close()


def test_every_use_of_a_table_gets_its_own_tick():
    """Else two lookups at once could give a row the age of an older one."""
    with closing(HostTier(overflow_policy=OverflowPolicy.EVICT_OLDEST)) as tier:
        tier.open_table(SPEC)
        ticks = tier._tables[TAG].ticks
        key = np.array([1])
        tier.insert(TAG, key, np.zeros((1, 4), np.float32))
        threads = [
            threading.Thread(
                target=lambda: [fetch(tier, SPEC, key) for _ in range(300)]
            )
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert next(ticks) == 1 + 1 + 900
