"""Sums over bags of rows, beside PyTorch's ``embedding_bag``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bench.gpu.baselines import Libraries
from bench.gpu.device import Array
from bench.gpu.timing import Work
from bench.gpu.works import SAMPLE, Stage
from hps_numba.kernels.cuda.operands import Bags, Batch

Check = Callable[[], None]


def works(libraries: Libraries, stage: Stage, keys_a_bag: int) -> list[Work]:
    """Return the pooled query, and what does the same from a dense table."""
    n_bags = stage.lookup.n // keys_a_bag
    begins = stage.scratch.upload(
        np.arange(n_bags + 1, dtype=np.uint64) * np.uint64(keys_a_bag)
    )
    found = [_ours(stage, n_bags, keys_a_bag, begins)]
    if libraries.torch is not None:
        found.append(_embedding_bag(libraries, stage, n_bags, keys_a_bag, begins))
    return found


def check_sums(stage: Stage, i: int, keys_a_bag: int, got: Array) -> None:
    """Fail if the first sums of launch ``i`` are further off than rounding explains."""
    numbers = stage.lookup.numbers[stage.lookup.at(i)][: len(got) * keys_a_bag]
    rows = stage.table.expected(numbers).astype(np.float64)
    sums = rows.reshape(len(got), keys_a_bag, -1).sum(1)
    slack = (keys_a_bag + 6) * 2.0**-24 * np.abs(sums)
    wrong = np.flatnonzero((np.abs(got - sums) > slack).any(1))
    assert not len(wrong), f"{len(wrong)} sums of {len(got)} are wrong: {wrong[:5]}"


def _sums_at(stage: Stage, n_bags: int, i: int) -> int:
    return stage.out + i * n_bags * stage.table.rows.out_bytes


def _ours(stage: Stage, n_bags: int, keys_a_bag: int, begins: int) -> Work:
    lookup, table, device = stage.lookup, stage.table, stage.device
    n_keys = n_bags * keys_a_bag

    def call(i: int) -> None:
        table.cache.pooled_query(
            Batch(n_bags, stage.keys_at(i)),
            Bags(begins, n_keys),
            _sums_at(stage, n_bags, i),
            stage.work,
            stream=device.stream,
        )

    def check() -> None:
        shape = min(n_bags, SAMPLE), table.rows.dim
        for i in (0, lookup.n_launches - 1):
            got = device.read(_sums_at(stage, n_bags, i), shape, np.float32)
            check_sums(stage, i, keys_a_bag, got)

    written = ((stage.out, lookup.n_launches * n_bags * table.rows.out_bytes),)
    return Work("pooled query", call, lookup.n_launches, n_keys, check, written)


def _embedding_bag(
    libraries: Libraries, stage: Stage, n_bags: int, keys_a_bag: int, begins: int
) -> Work:
    lookup, table = stage.lookup, stage.table
    torch = libraries.torch
    n, n_keys = lookup.n_launches, n_bags * keys_a_bag
    dense = libraries.tensor(
        table.dense, (table.n_rows, table.rows.dim), table.rows.stored
    )
    starts = libraries.tensor(begins, (n_bags,), "int64")
    asked = [
        libraries.tensor(lookup.indices + 8 * i * lookup.n, (n_keys,), "int64")
        for i in range(n)
    ]
    sums: list[object] = [None]
    embedding_bag = torch.nn.functional.embedding_bag

    def call(i: int) -> None:
        sums[0] = embedding_bag(asked[i], dense, starts, mode="sum")

    def check() -> None:
        shape = n_bags, table.rows.dim
        out = libraries.tensor(_sums_at(stage, n_bags, 0), shape, "float32")
        for i in (0, n - 1):
            queue(i)
            libraries.on_torch_stream(lambda _: out.copy_(sums[0]))(i)
            sample = min(n_bags, SAMPLE), table.rows.dim
            address = _sums_at(stage, n_bags, 0)
            got = stage.device.read(address, sample, np.float32)
            check_sums(stage, i, keys_a_bag, got)

    queue = libraries.on_torch_stream(call)
    return Work("torch embedding_bag", queue, n, n_keys, check, is_baseline=True)
