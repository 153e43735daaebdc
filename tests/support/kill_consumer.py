"""Servers that follow a stream, to be killed: ``kill_consumer.py PS_JSON``.

A process that has imported all that a server needs forks one for each line ``start``,
and ends with its input. What is written to standard output, a line each:

    pid <process>                                a server starts
    begin <partition> <since> <until> <keys>     a span goes to RocksDB
    end <keys>                                   RocksDB has it; how many it wrote
    ended <status>                               the server died; negative: of a signal

Messages are cut into small pieces, and small bursts go in as sorted files.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from hps_numba import HPS
from hps_numba.config import ParameterServerConfig
from hps_numba.runtime.updates import consumer, partition
from hps_numba.tiers import host, rocksdb, rocksdb_table
from hps_numba.tiers.base import Tier
from hps_numba.types import Keys, Rows, StreamSpan

PIECE_ROWS = 100
FILE_ROWS = 400  # from which on a burst becomes sorted files
STUCK_S = 20  # after which a server shows what it is doing
LIFE_S = 120  # of a server that nobody kills

__all__ = ["consumer", "host", "rocksdb"]  # imported before a server is forked


def report(line: str) -> None:
    """Write a line to the test, all at once."""
    os.write(1, f"{line}\n".encode())


def telling(tier: Tier) -> Tier:
    """Let RocksDB tell of the spans that it is given."""
    if tier.name == "rocksdb":
        lasting: Any = tier  # still a LastingTier, as a wrapper would not be
        lasting.apply = _telling(lasting.apply)
    return tier


def _telling(apply: Callable[..., int]) -> Callable[..., int]:
    def told(tag: str, keys: Keys, rows: Rows | None, span: StreamSpan) -> int:
        report(f"begin {span.partition} {span.since} {span.until} {keys.size}")
        written = apply(tag, keys, rows, span)
        report(f"end {written}")
        return written

    return told


def serve(config: ParameterServerConfig) -> None:
    """Serve until killed."""
    faulthandler.dump_traceback_later(STUCK_S)
    signal.alarm(LIFE_S)
    partition.PIECE_ROWS = PIECE_ROWS
    rocksdb_table._BURST_ROWS = FILE_ROWS
    with HPS(config, wrap_tier=telling):
        signal.pause()


def main(path: str) -> None:
    """Fork a server for each line of the input, one after the other."""
    config = ParameterServerConfig.from_json(path)
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            report(f"pid {os.getpid()}")
            serve(config)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        report(f"ended {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main(sys.argv[1])
