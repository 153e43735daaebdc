"""A trainer in a process of its own: publishes rows at a rate, when it is told to.

::

    python -m bench.stream_publisher BROKERS MODEL TABLE DIM KEYS ROWS_PER_S

It prints ``ready``. A line on standard input, ``go`` or ``halt``, switches it on or
off; the end of the input ends it. Every batch has a row of key -1 whose first two
values are the time at which it was sent, as a float64 in their bytes.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import numpy as np

from bench.defaults import SEED
from hps_numba.runtime.updates.producer import UpdateProducer
from hps_numba.types import Rows, TableSpec

CLOCK_KEY = -1
BATCH_S = 0.01


@dataclass(frozen=True)
class Publisher:
    """A publisher that runs, to be switched on and off."""

    process: subprocess.Popen[str]

    def tell(self, word: str) -> None:
        """Say ``go`` or ``halt``."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()


@contextmanager
def publisher(
    brokers: str, table: TableSpec, n_keys: int, rows_per_s: int
) -> Iterator[Publisher]:
    """Run a publisher of random rows of the keys ``0 .. n_keys - 1``."""
    arguments = [brokers, table.model, table.name, table.dim, n_keys, rows_per_s]
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.stream_publisher", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            assert process.stdout.readline() == "ready\n", "the publisher did not start"
            yield Publisher(process)
            process.stdin.close()
            assert process.wait(30) == 0, "the publisher failed"
        finally:
            process.kill()


def sent_at(row: Rows) -> float:
    """Return the time in a row of ``CLOCK_KEY``."""
    return float(row[:2].copy().view(np.float64)[0])


def _publish(
    producer: UpdateProducer, table: TableSpec, n_keys: int, rows_per_s: int
) -> None:
    going = threading.Event()
    ended = threading.Event()
    threading.Thread(
        target=_listen, args=(sys.stdin, going, ended), daemon=True
    ).start()
    rng = np.random.default_rng(SEED)
    n = max(round(rows_per_s * BATCH_S), 1)
    rows = rng.random((n + 1, table.dim), np.float32)
    due_s = time.monotonic()
    print("ready", flush=True)
    while not ended.is_set():
        if not going.wait(0.05):
            due_s = time.monotonic()
            continue
        keys = np.append(rng.integers(0, n_keys, n), CLOCK_KEY)
        rows[-1, :2] = np.array([time.time()]).view(np.float32)
        producer.send(table.model, table.name, keys, rows)
        due_s = max(due_s + BATCH_S, time.monotonic() - 1.0)
        time.sleep(max(due_s - time.monotonic(), 0.0))


def _listen(words: IO[str], going: threading.Event, ended: threading.Event) -> None:
    for word in words:
        if word == "go\n":
            going.set()
        else:
            going.clear()
    ended.set()


def main() -> None:
    """Publish until standard input ends."""
    brokers, model, name, dim, n_keys, rows_per_s = sys.argv[1:]
    table = TableSpec(model, name, int(dim))
    with UpdateProducer(brokers) as producer:
        _publish(producer, table, int(n_keys), int(rows_per_s))


if __name__ == "__main__":
    main()
