"""The kernels in a weak memory, with old values wherever nothing forbids them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.kernels.cuda import weak_checks

RACING_READS = 20_000


def test_no_row_is_torn_foreign_or_old_in_a_very_weak_memory() -> None:
    total = weak_checks.mixed_reads()
    assert total.n_hits >= RACING_READS
    assert total.n_misses > 0


@pytest.mark.parametrize(
    "check",
    [
        weak_checks.updates,
        weak_checks.backfills,
        weak_checks.duplicates,
        weak_checks.pairs,
        weak_checks.first_dumps,
        weak_checks.whole_dumps,
        weak_checks.launch_ends,
        weak_checks.pooled_updates,
    ],
    ids=lambda check: check.__name__,
)
def test_kernels_order_all_that_has_to_be_in_order(check: Callable[[], None]) -> None:
    check()
