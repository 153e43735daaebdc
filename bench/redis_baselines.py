"""What the Redis tier is measured against: redis-py, redis-benchmark, and nothing.

All of them read the rows that the tier wrote, under the names that it gave them; only
redis-benchmark, which cannot make such names, has a table of its own.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import redis

from hps_numba.kernels.host import resp_write as write
from hps_numba.kernels.host.hashing import group_by_partition
from hps_numba.tiers.redis.channel import COMMANDS_IN_FLIGHT, KEYS_PER_COMMAND
from hps_numba.tiers.redis.layout import KEY_BYTES, Bytes, Layout, Numbers
from hps_numba.types import Keys, Rows

REDIS_BENCHMARK_HINT = (
    "redis-benchmark is not on the PATH; Debian's package redis-tools has it"
)
HIREDIS_HINT = "hiredis is not installed, so redis-py parses replies in Python"
RECEIVE_BYTES = 256 << 10
_DIGITS = 12  # that redis-benchmark puts in the place of __rand_int__


def slow_parser() -> dict[str, str]:
    """Return that redis-py is slower than it could be, by name; empty if it is not."""
    return {} if find_spec("hiredis") else {"hiredis": HIREDIS_HINT}


def names_of(layout: Layout, keys: Keys) -> list[bytes]:
    """Return the name of each row in the layout ``strings``."""
    order, bounds = group_by_partition(keys, layout.n_partitions)
    partitions = np.empty(keys.size, np.int64)
    partitions[order] = np.repeat(np.arange(layout.n_partitions), np.diff(bounds))
    raw, prefixes = keys.tobytes(), layout.prefixes
    return [
        prefixes[p] + raw[i * KEY_BYTES : (i + 1) * KEY_BYTES]
        for i, p in enumerate(partitions.tolist())
    ]


def read_plainly(client: Any, names: Sequence[bytes], out: Rows) -> None:
    """Read rows as redis-py's users do; a cluster is asked slot by slot."""
    ask = client.mget
    if isinstance(client, redis.RedisCluster):
        ask = client.mget_nonatomic
    for i, value in enumerate(ask(names)):
        out[i] = np.frombuffer(value, out.dtype)


def write_plainly(
    client: redis.Redis, names: Sequence[bytes], rows: Rows, *, batch: int = 10_000
) -> None:
    """Write rows by SET, in pipelines of ``batch`` commands."""
    for start in range(0, len(names), batch):
        with client.pipeline(transaction=False) as pipeline:
            for name, row in zip(
                names[start : start + batch], rows[start : start + batch], strict=True
            ):
                pipeline.set(name, row.tobytes())
            pipeline.execute()


@dataclass(frozen=True)
class Request:
    """Commands that are ready to be sent, and how long their replies are."""

    text: memoryview
    ends: list[int]  # of the commands
    reply_ends: list[int]


class NullClient:
    """Sends the tier's commands, made before, and drops the replies unread.

    What is left is the server and the way to it: nothing that reads rows is faster.

    Parameters
    ----------
    port
        Of a single server on loopback.
    layout
        Of the table, which has a row for every key.
    """

    def __init__(self, port: int, layout: Layout) -> None:
        self._layout = layout
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._input = memoryview(bytearray(RECEIVE_BYTES))

    def prepare(self, keys: Keys) -> Request:
        """Return the commands that ask for the rows of keys."""
        order, bounds = group_by_partition(keys, self._layout.n_partitions)
        text, ends, key_ends = key_commands(self._layout, keys, order, bounds)
        n_keys = np.diff(key_ends, prepend=0)
        row = self._layout.spec.row_bytes
        each = len(f"${row}\r\n") + row + 2
        heads = [len(f"*{n}\r\n") for n in n_keys.tolist()]
        replies = np.cumsum(n_keys * each + heads)
        return Request(memoryview(text.data), ends.tolist(), replies.tolist())

    def exchange(self, request: Request) -> None:
        """Send the commands, as many in flight as the tier has."""
        connection, text, ends = self._socket, request.text, request.ends
        sent = answered = received = 0
        last, total = len(ends) - 1, request.reply_ends[-1]
        while received < total:
            end = ends[min(answered + COMMANDS_IN_FLIGHT - 1, last)]
            if sent < end:
                connection.sendall(text[sent:end])
                sent = end
            n_bytes = connection.recv_into(self._input)
            assert n_bytes, "the server hung up"
            received += n_bytes
            while answered <= last and request.reply_ends[answered] <= received:
                answered += 1
        assert received == total, "replies are not those of rows"

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


def key_commands(
    layout: Layout, keys: Keys, order: Numbers, bounds: Numbers
) -> tuple[Bytes, Numbers, Numbers]:
    """Return the commands that read keys, where each ends, and after which key."""
    text = layout.reading
    n_bytes, n_commands = write.key_commands_size(
        keys.size, layout.n_partitions, text.max_head, text.max_lead, KEYS_PER_COMMAND
    )
    buffer = np.empty(n_bytes, np.uint8)
    ends, key_ends = np.empty((2, n_commands), np.int64)
    n_commands = write.build_key_commands(
        buffer,
        ends,
        key_ends,
        np.empty(keys.size, np.int64),
        keys,
        order,
        bounds,
        np.arange(layout.n_partitions),
        text.heads,
        text.head_at,
        text.leads,
        text.lead_at,
        text.n_fixed,
        KEYS_PER_COMMAND,
    )
    return buffer, ends[:n_commands], key_ends[:n_commands]


@dataclass(frozen=True)
class RedisBenchmark:
    """Redis's own benchmark program: MGET of the tier's shape, replies parsed.

    Names have twelve random digits where the tier's have eight bytes, and are as long
    as those of the tier. It has two connections with four commands in flight each, as
    it is fastest.

    Parameters
    ----------
    port
        Of a single server, of which the table has the memory for itself.
    n_rows, row_bytes
        Shape of the table.
    name_bytes
        Length of the tier's names.
    """

    port: int
    n_rows: int
    row_bytes: int
    name_bytes: int

    @staticmethod
    def absent() -> dict[str, str]:
        """Return why the program cannot run, by name; empty if it can."""
        found = shutil.which("redis-benchmark")
        return {} if found else {"redis-benchmark": REDIS_BENCHMARK_HINT}

    @property
    def prefix(self) -> str:
        """What precedes the digits."""
        return "k" * (self.name_bytes - _DIGITS)

    def fill(self, client: redis.Redis, keys: Keys) -> None:
        """Write the table, in the order of the keys."""
        row, prefix = bytes(self.row_bytes), self.prefix
        for low in range(0, keys.size, KEYS_PER_COMMAND):
            part = keys[low : low + KEYS_PER_COMMAND].tolist()
            client.mset({f"{prefix}{key:0{_DIGITS}d}": row for key in part})

    def mget_s(self, n_commands: int) -> float:
        """Return the seconds in which it read so many commands' worth of rows."""
        done = subprocess.run(
            [
                shutil.which("redis-benchmark") or "redis-benchmark",
                *("-p", str(self.port), "-c", "2", "-P", "4", "--csv"),
                *("-n", str(n_commands), "-r", str(self.n_rows), "MGET"),
                *[f"{self.prefix}__rand_int__"] * KEYS_PER_COMMAND,
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        return n_commands / commands_per_s(done.stdout)


def commands_per_s(output: str) -> float:
    """Return the rate in the CSV that redis-benchmark printed.

    Raises
    ------
    ValueError
        If there is none.
    """
    last = output.strip().rpartition("\n")[2]
    rate = re.match(r'"[^"]*","(\d+\.\d+)"', last)
    if rate is None or float(rate[1]) == 0:
        raise ValueError(f"redis-benchmark gave no rate: {output[-200:]!r}")
    return float(rate[1])
