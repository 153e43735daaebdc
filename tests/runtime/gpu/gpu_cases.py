"""What to run in every order over GPU caches.

``HPS_TEST_ALL_ORDERS=1`` adds worlds that take minutes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hps_numba.tiers.base import Tier
from hps_numba.tiers.host import HostTier
from tests.runtime.gpu.gpu_histories import GpuHistory, GpuStage, footprint
from tests.runtime.histories import UpperTier
from tests.support.orders import Exploration, explore

HOST = (HostTier,)


@dataclass(frozen=True)
class Case:
    """Tasks to run in every order, and what they run on."""

    add: Callable[[GpuHistory], object]
    uppers: tuple[type[Tier], ...] = ()
    warm: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        name = self.add.__name__.replace("_", " ")
        above = " over ".join(("gpu", *(tier.name for tier in self.uppers), "lower"))
        options = "".join(f" {k}={v}" for k, v in self.options.items())
        return f"{name} {above}{options} {'warm' if self.warm else 'cold'}"

    def explore(self, stage: GpuStage, **options: Any) -> Exploration:
        """Run every order on a stage."""

        def world() -> GpuHistory:
            history = GpuHistory(stage, warm=self.warm)
            self.add(history)
            return history

        return explore(world, footprint, **options)


def lookup_update(h: GpuHistory) -> None:
    h.lookup("a")
    h.update(2)


def lookup_update_evict(h: GpuHistory) -> None:
    lookup_update(h)
    h.evict()


def lookup_update_crowd(h: GpuHistory) -> None:
    lookup_update(h)
    h.crowd()


def lookup_delete_crowd(h: GpuHistory) -> None:
    h.lookup("a")
    h.delete()
    h.crowd()


def lookup_update_that_fails(h: GpuHistory) -> None:
    h.lookup("a")
    h.failing_update(2)


def lookup_update_that_fails_late(h: GpuHistory) -> None:
    h.lookup("a")
    h.failing_update(2, late=True)


def lookup_two_updates(h: GpuHistory) -> None:
    h.lookup("a")
    h.update(2, 3)


def two_lookups_update(h: GpuHistory) -> None:
    h.lookup("a", "b")
    h.update(2)


def lookup_reload(h: GpuHistory) -> None:
    h.lookup("a")
    h.reload(2)


def lookup_update_refresh(h: GpuHistory) -> None:
    lookup_update(h)
    h.refresh()


def lookup_update_refresh_of_the_key(h: GpuHistory) -> None:
    lookup_update(h)
    h.refresh_key()


def update_refresh(h: GpuHistory) -> None:
    h.update(2)
    h.refresh()


def update_refresh_of_the_key(h: GpuHistory) -> None:
    h.update(2)
    h.refresh_key()


def delete_refresh(h: GpuHistory) -> None:
    h.delete()
    h.refresh()


def update_reload(h: GpuHistory) -> None:
    h.update(2)
    h.reload(3)


def reload_refresh(h: GpuHistory) -> None:
    h.reload(2)
    h.refresh()


def warm_up_update(h: GpuHistory) -> None:
    h.warm_up()
    h.update(2)


def warm_up_delete(h: GpuHistory) -> None:
    h.warm_up()
    h.delete()


def warm_up_lookup_update(h: GpuHistory) -> None:
    h.warm_up()
    lookup_update(h)


def warm_up_reload(h: GpuHistory) -> None:
    h.warm_up()
    h.reload(2)


def lookup_on_the_second_device_update(h: GpuHistory) -> None:
    h.lookup_on(1, "a")
    h.update(2)


def lookups_on_both_devices_update(h: GpuHistory) -> None:
    h.lookup_on(0, "a")
    h.lookup_on(1, "b")
    h.update(2)


DEFERRED = {"threshold": 0.0}
TWO = {"devices": 2}
CASES = [
    Case(lookup_update, HOST),
    Case(lookup_update, warm=True),
    Case(lookup_delete_crowd, warm=True),
    Case(lookup_update_that_fails, HOST),
    Case(lookup_update_that_fails_late, HOST),
    Case(lookup_update_that_fails_late, warm=True),
    Case(lookup_two_updates, warm=True),
    Case(lookup_reload, HOST),
    Case(lookup_update_refresh_of_the_key),
    Case(update_refresh, HOST, warm=True),
    Case(update_refresh_of_the_key, HOST, warm=True),
    Case(delete_refresh, HOST, warm=True),
    Case(update_reload, HOST, warm=True),
    Case(reload_refresh, HOST, warm=True),
    Case(warm_up_update, HOST),
    Case(warm_up_delete, HOST),
    Case(warm_up_reload),
    Case(lookup_update, options=DEFERRED),
    Case(lookup_reload, options=DEFERRED),
    Case(lookup_on_the_second_device_update, options=TWO),
    Case(lookups_on_both_devices_update, warm=True, options=TWO),
    Case(lookup_update_crowd),
    Case(lookup_update_crowd, warm=True),
    Case(lookup_delete_crowd),
    Case(lookup_two_updates),
    Case(lookup_update_refresh, warm=True),
    Case(two_lookups_update, (UpperTier,), warm=True),
    Case(lookup_delete_crowd, options=DEFERRED),
]
if os.environ.get("HPS_TEST_ALL_ORDERS"):
    CASES += [
        Case(lookup_update_evict, HOST),
        Case(lookup_update_crowd, HOST),
        Case(lookup_update_refresh, HOST),
        Case(lookup_update_refresh_of_the_key, HOST),
        Case(two_lookups_update),
        Case(warm_up_lookup_update),
        Case(lookup_update, HOST, options=DEFERRED),
        Case(lookup_reload, HOST, options=DEFERRED),
        Case(lookups_on_both_devices_update, options=TWO),
    ]
