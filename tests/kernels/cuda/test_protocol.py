"""The sequence protocol as the kernels' PTX has it."""

from __future__ import annotations

import pytest

from hps_numba.kernels.cuda.cache import Cache
from hps_numba.kernels.cuda.compiling import KernelSpec
from hps_numba.kernels.cuda.dump import dump_kernel
from hps_numba.kernels.cuda.evict import clear_kernel, evict_kernel
from hps_numba.kernels.cuda.insert import insert_kernel
from hps_numba.kernels.cuda.layout import CacheLayout, Policy, RowLayout, TableLayout
from hps_numba.kernels.cuda.pooled import pooled_query_kernel
from hps_numba.kernels.cuda.query import query_kernel
from hps_numba.kernels.cuda.update import update_kernel
from tests.kernels.cuda.protocol import (
    Flow,
    check_dump,
    check_last_block,
    check_reader,
    check_writer,
)

ROWS = (RowLayout(12), RowLayout(3, "float16"))
READERS = [query_kernel(ROWS[0], Policy.LRU), query_kernel(ROWS[1], Policy.LFU)]
READERS += [pooled_query_kernel(ROWS[0], Policy.LRU)]
READERS += [query_kernel(ROWS[0], Policy.STATIC)]
READERS += [pooled_query_kernel(ROWS[0], Policy.STATIC)]
WRITERS = [insert_kernel(ROWS[0], Policy.LRU), insert_kernel(ROWS[1], Policy.LFU)]
WRITERS += [*(update_kernel(rows, Policy.LRU) for rows in ROWS)]
WRITERS += [evict_kernel(Policy.LRU), clear_kernel()]
PAIR_WRITERS = [insert_kernel(ROWS[0], Policy.STATIC), evict_kernel(Policy.STATIC)]
PAIR_WRITERS += [update_kernel(rows, Policy.STATIC) for rows in ROWS]

# What may race says how it is ordered; the rest is constant, or the output. At
# the scope of a block is the clock of scores, of which an old value will do.
ACCESSES = {
    "ld.global.nc",
    "ld.relaxed.cta.global",
    "ld.relaxed.gpu.global",
    "ld.relaxed.gpu.global.L1::no_allocate",
    "ld.acquire.gpu.global",
    "st.relaxed.gpu.global",
    "st.release.gpu.global",
    "st.global.cs",
}


def name_of(spec: KernelSpec) -> str:
    return spec.name


@pytest.mark.parametrize("spec", READERS, ids=name_of)
def test_a_reader_looks_again_after_all_lanes_have_read(spec: KernelSpec) -> None:
    check_reader(Flow.of(spec))


@pytest.mark.parametrize("spec", WRITERS, ids=name_of)
def test_a_writer_stores_between_lock_and_unlock(spec: KernelSpec) -> None:
    check_writer(Flow.of(spec))


@pytest.mark.parametrize("spec", PAIR_WRITERS, ids=name_of)
def test_a_writer_of_two_sets_stores_between_lock_and_unlock(spec: KernelSpec) -> None:
    check_writer(Flow.of(spec), n_sets=2)


def test_a_dump_looks_again_after_it_has_read() -> None:
    check_dump(Flow.of(dump_kernel()))


@pytest.mark.parametrize("spec", [*READERS, dump_kernel()], ids=name_of)
def test_the_last_block_sees_what_the_others_counted(spec: KernelSpec) -> None:
    check_last_block(Flow.of(spec))


@pytest.mark.parametrize("policy", Policy)
def test_every_access_to_what_may_race_is_ordered_or_relaxed(policy: Policy) -> None:
    found: dict[str, set[str]] = {}
    layout = CacheLayout(RowLayout(12), (TableLayout(1),))
    for spec in Cache(layout, policy, base=256, launcher=None).kernels():
        for one in Flow.of(spec).accesses():
            found.setdefault(one, set()).add(spec.name)
    atomics = {one for one in found if one.startswith("atom")}
    assert set(found) - atomics <= ACCESSES, found
    assert all(".gpu.global." in one for one in atomics), atomics


def test_paths_go_both_ways_at_a_branch_and_past_what_is_wanted_at_none() -> None:
    flow = Flow(
        (
            "first;",
            "@%p1 bra $skip;",
            "wanted;",
            "$skip:",
            "last;",
            "bra.uni $end;",
            "first;",
            "$end:",
            "ret;",
        )
    )
    flow.check_between("wanted", "last", "skip")
    with pytest.raises(AssertionError, match="'last;' may follow"):
        flow.check_between("first", "last", "wanted")
    with pytest.raises(AssertionError, match="no /other/"):
        flow.check_between("first", "other", "wanted")
