"""Bugs in the order of memory accesses, and which check has to catch each.

A memory as strong as this CPU's hides most of them.

In no list are the fences around the tickets by which the tables of a query find the
last of them. That one alone stores, and what it must not overtake are others' loads: a
load that returns a value stored later has no model here.
"""

from __future__ import annotations

import importlib

from tests.kernels.cuda.mutants import Mutant, planted
from tests.support.cpuexec import KernelError

CHECKS = "tests.kernels.cuda.weak_checks"

_LOCKS = [
    Mutant(
        "the lock is no acquire",
        "ptx",
        'swap_acquire_u32 = _compare_and_swap("acquire", 32)',
        'swap_acquire_u32 = _compare_and_swap("relaxed", 32)',
        "duplicates",
    ),
    Mutant(
        "lanes do not meet after the lock",
        "device",
        "    cuda.syncwarp(FULL_WARP)\n    # Each lane's",
        "    # Each lane's",
        "duplicates",
    ),
    Mutant(
        "no fence after the lock",
        "device",
        "for any reader that sees them.\n    fence()\n",
        "for any reader that sees them.\n",
        "updates",
    ),
    Mutant(
        "the fence after the lock comes before the lanes meet",
        "device",
        "    cuda.syncwarp(FULL_WARP)\n    # Each lane's writes come after the odd "
        "number, for any reader that sees them.\n    fence()\n",
        "    fence()\n    cuda.syncwarp(FULL_WARP)\n",
        "updates",
    ),
    Mutant(
        "lanes do not meet before the unlock",
        "device",
        "    cuda.syncwarp(FULL_WARP)\n    if cuda.laneid == 0:\n        store_release",
        "    if cuda.laneid == 0:\n        store_release",
        "updates",
    ),
    Mutant(
        "the unlock is no release",
        "device",
        "    store_release_u32,\n",
        "    store_u32 as store_release_u32,\n",
        "backfills",
    ),
]

_END = "    fence()\n    cuda.syncwarp(FULL_WARP)\n\n\n@cuda"
_READERS = [
    Mutant(
        "a set's first look is no acquire",
        "device",
        "low = load_acquire_quad(meta)",
        "low = load_quad(meta)",
        "updates",
    ),
    Mutant(
        "lanes do not meet before they read rows",
        "query",
        "            begin_reads()\n",
        "",
        "updates",
    ),
    Mutant(
        "lanes do not meet before they sum rows",
        "pooled",
        "        begin_reads()\n",
        "",
        "pooled_updates",
    ),
    Mutant(
        "no fence after the rows were read",
        "device",
        _END,
        "    cuda.syncwarp(FULL_WARP)\n\n\n@cuda",
        "updates",
    ),
    Mutant(
        "lanes do not meet after the rows were read",
        "device",
        _END,
        "    fence()\n\n\n@cuda",
        "updates",
    ),
    Mutant(
        "the fence after the rows comes after the lanes meet",
        "device",
        _END,
        "    cuda.syncwarp(FULL_WARP)\n    fence()\n\n\n@cuda",
        "updates",
    ),
    Mutant(
        "a dump's first look is no acquire",
        "dump",
        "seq = load_acquire_u32(meta)",
        "seq = load_u32(meta)",
        "first_dumps",
    ),
    Mutant(
        "no fence before a dump's second look",
        "dump",
        "    fence()\n    common",
        "    common",
        "first_dumps",
    ),
]

_ENDS = [
    Mutant(
        "no fence before a query's ticket",
        "misses",
        "        fence()\n        ticket",
        "        ticket",
        "launch_ends",
    ),
    Mutant(
        "no fence after a query's last ticket",
        "misses",
        "            fence()\n            results",
        "            results",
        "launch_ends",
    ),
    Mutant(
        "no fence before a dump's ticket",
        "dump",
        "        fence()\n        ticket",
        "        ticket",
        "whole_dumps",
    ),
    Mutant(
        "no fence after a dump's last ticket",
        "dump",
        "            fence()\n            # As",
        "            # As",
        "whole_dumps",
    ),
]

_PAIRS = [
    Mutant(
        "the lock of either of two sets is no acquire",
        "ptx",
        'swap_acquire_u32 = _compare_and_swap("acquire", 32)',
        'swap_acquire_u32 = _compare_and_swap("relaxed", 32)',
        "pairs",
    ),
    Mutant(
        "lanes do not meet after the locks of two sets",
        "device",
        "    cuda.syncwarp(FULL_WARP)\n    # Each lane's",
        "    # Each lane's",
        "pairs",
    ),
    Mutant(
        "no fence after the rows of static tables were read",
        "device",
        _END,
        "    cuda.syncwarp(FULL_WARP)\n\n\n@cuda",
        "pairs",
    ),
    Mutant(
        "the unlock of either of two sets is no release",
        "device",
        "    store_release_u32,\n",
        "    store_u32 as store_release_u32,\n",
        "pairs",
    ),
    Mutant(
        "a first look into either of two sets is no acquire",
        "device",
        "low = load_acquire_quad(meta)",
        "low = load_quad(meta)",
        "pairs",
    ),
]

WEAK_MUTANTS = [*_LOCKS, *_READERS, *_ENDS, *_PAIRS]


def verdict_of(mutant: Mutant) -> str:
    """Plant a bug and run its check; return how it failed, or nothing."""
    with planted(mutant):
        check = getattr(importlib.import_module(CHECKS), mutant.check)
        try:
            check()
        except (AssertionError, KernelError) as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""
