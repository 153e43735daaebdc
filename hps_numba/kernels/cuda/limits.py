"""What every kernel is held to on every compute capability that is supported.

A limit is not an aim: it is the value above which a change has made a kernel worse. The
compile gate (``python -m tests.support.gate``) prints what the kernels take.
"""

from __future__ import annotations

from dataclasses import dataclass

CAPABILITIES = ((7, 5), (8, 0), (9, 0), (10, 0))


@dataclass(frozen=True)
class Limit:
    """The most that a kernel takes and the least that it does at once, in any shape.

    Parameters
    ----------
    registers
        Registers a thread at most.
    instructions
        Machine instructions at most.
    row_loads, row_stores
        Loads and stores of a row's whole unit at least, where a lane has as many to
        move: what is in flight.
    shared_bytes
        Static shared memory a block at most.
    """

    registers: int
    instructions: int
    row_loads: int = 0
    row_stores: int = 0
    shared_bytes: int = 0


# By how a kernel's name begins; kernels of static tables, which look into two sets, may
# have limits of their own.
LIMITS: dict[str, Limit] = {
    "query": Limit(registers=72, instructions=1350, row_loads=4, row_stores=4),
    "scatter": Limit(registers=80, instructions=350, row_loads=4, row_stores=4),
    "insert": Limit(registers=56, instructions=1000, row_loads=4, row_stores=4),
    "insert_static": Limit(registers=64, instructions=1000, row_loads=4, row_stores=4),
    "update": Limit(registers=48, instructions=750, row_loads=4, row_stores=4),
    "pooled_query": Limit(registers=160, instructions=1200, row_loads=4, row_stores=1),
    "pooled_query_static": Limit(168, instructions=1200, row_loads=4, row_stores=1),
    "pooled_scatter": Limit(registers=96, instructions=900, row_loads=4, row_stores=1),
    "evict": Limit(registers=40, instructions=550),
    "clear": Limit(registers=32, instructions=500),
    "dump": Limit(registers=32, instructions=650),
}


def kind_of(kernel: str) -> str:
    """Return which of ``LIMITS`` is for a kernel, by ``KernelSpec.name``.

    Raises
    ------
    KeyError
        If none is.
    """
    for kind in LIMITS:
        if kernel == kind or kernel.startswith(f"{kind}_"):
            own = f"{kind}_static"
            return own if kernel.endswith("_static") and own in LIMITS else kind
    raise KeyError(kernel)
