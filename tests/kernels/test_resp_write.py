from __future__ import annotations

import numpy as np
import pytest

from hps_numba.kernels.host import resp_write as writing
from hps_numba.kernels.host.hashing import group_by_partition
from tests.kernels.resp_plain import as_bytes, command, guarded, guards_hold
from tests.kernels.test_hashing import EXTREME_KEYS

PREFIXES = [b"", b"x", b"hps_et{hps_et.model.table/p%d}", b"p" * 31, b"q" * 100]


def key_bytes(key: int) -> bytes:
    return int(key).to_bytes(8, "little", signed=True)


def head_of(name: bytes, *fixed: bytes) -> bytes:
    """What a command says before its keys, but for the number of arguments."""
    return command(name, *fixed).split(b"\r\n", 1)[1]


def lead_of(prefix: bytes) -> bytes:
    return b"$%d\r\n%s" % (len(prefix) + 8, prefix)


def joined(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    ends = np.cumsum([0] + [len(text) for text in texts], dtype=np.int64)
    return as_bytes(b"".join(texts)), ends


class KeyCommands:
    """Keys of some partitions, written by the kernel and by plain Python."""

    def __init__(self, keys, n_partitions, partitions, prefix, fixed, per_command):
        self.keys = np.array(keys, np.int64)
        self.order, self.bounds = group_by_partition(self.keys, n_partitions)
        self.partitions = np.array(partitions, np.int64)
        every = range(n_partitions)
        self.fixed = [
            [name % p if b"%d" in name else name for name in fixed] for p in every
        ]
        self.prefixes = [prefix % p if b"%d" in prefix else prefix for p in every]
        self.heads = [head_of(*fixed) for fixed in self.fixed]
        self.leads = [lead_of(prefix) for prefix in self.prefixes]
        self.per_command = per_command

    def size(self) -> tuple[int, int]:
        most = [max(map(len, texts)) for texts in (self.heads, self.leads)]
        counts = (len(self.keys), len(self.partitions))
        return writing.key_commands_size(*counts, *most, self.per_command)

    def expected(self) -> tuple[list[bytes], list[int]]:
        commands, targets = [], []
        for p in self.partitions:
            mine = self.order[self.bounds[p] : self.bounds[p + 1]].tolist()
            for first in range(0, len(mine), self.per_command):
                some = mine[first : first + self.per_command]
                names = [self.prefixes[p] + key_bytes(self.keys[i]) for i in some]
                commands.append(command(*self.fixed[p], *names))
                targets += some
        return commands, targets

    def build(self, n_bytes: int, n_commands: int, n_targets: int):
        whole, buf = guarded(n_bytes)
        ends = np.full(n_commands + 1, -7, np.int64)
        key_ends = ends.copy()
        targets = np.full(n_targets + 1, -7, np.int64)
        heads, head_at = joined(self.heads)
        leads, lead_at = joined(self.leads)
        n = writing.build_key_commands(
            buf,
            ends[:-1],
            key_ends[:-1],
            targets[:-1],
            self.keys,
            self.order,
            self.bounds,
            self.partitions,
            heads,
            head_at,
            leads,
            lead_at,
            len(self.fixed[0]),
            self.per_command,
        )
        assert guards_hold(whole)
        assert ends[-1] == key_ends[-1] == targets[-1] == -7
        return n, buf, ends[:-1], key_ends[:-1], targets[:-1]

    def check(self) -> None:
        commands, sent = self.expected()
        n_bytes, n_commands = self.size()
        n, buf, ends, key_ends, targets = self.build(n_bytes, n_commands, len(sent))
        assert n == len(commands) <= n_commands
        assert ends[:n].tolist() == np.cumsum([len(c) for c in commands]).tolist()
        sizes = [count_of(c) - len(self.fixed[0]) for c in commands]
        assert key_ends[:n].tolist() == np.cumsum(sizes).tolist()
        assert bytes(buf[: ends[n - 1] if n else 0]) == b"".join(commands)
        assert targets.tolist() == sent


def count_of(text: bytes) -> int:
    return int(text[1 : text.index(b"\r\n")])


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("fixed", [[b"MGET"], [b"HMGET", b"hps_et{T/p%d}v"]])
@pytest.mark.parametrize("per_command", [1, 7, 512])
def test_commands_name_the_keys_of_each_partition(prefix, fixed, per_command):
    rng = np.random.default_rng(len(prefix))
    keys = np.concatenate([EXTREME_KEYS, rng.integers(-(2**63), 2**63 - 1, 400)])
    KeyCommands(keys, 13, range(13), prefix, fixed, per_command).check()


def test_only_the_named_partitions_are_written_in_their_order():
    keys = np.arange(500)
    KeyCommands(keys, 16, [11, 2, 5], b"hps_et{T/p%d}", [b"UNLINK"], 9).check()
    KeyCommands(keys, 16, [], b"hps_et{T/p%d}", [b"UNLINK"], 9).check()


def test_an_empty_partition_writes_nothing():
    few = KeyCommands([1, 2], 16, range(16), b"p%d:", [b"MGET"], 4)
    assert len(few.expected()[0]) <= 2
    few.check()
    KeyCommands([], 4, range(4), b"p%d:", [b"MGET"], 4).check()


@pytest.mark.parametrize("n_keys", [1, 8, 9, 10, 98, 99, 100, 998, 999, 1000, 12345])
def test_the_number_of_arguments_has_any_number_of_digits(n_keys):
    KeyCommands(np.arange(n_keys), 1, [0], b"", [b"MGET"], n_keys).check()


def test_buffers_that_are_too_small_are_left_unfinished():
    case = KeyCommands(np.arange(100), 3, range(3), b"p%d:", [b"MGET"], 10)
    commands = case.expected()[0]
    n_bytes = len(b"".join(commands))
    enough, n_commands = case.size()
    assert case.build(enough, len(commands), 100)[0] == len(commands)
    for sizes in (
        (n_bytes - 1, n_commands, 100),
        (0, n_commands, 100),
        (enough, len(commands) - 1, 100),
        (enough, n_commands, 99),
    ):
        assert case.build(*sizes)[0] == writing.NO_ROOM


def test_no_keys_need_more_than_the_size_that_is_given():
    rng = np.random.default_rng(4)
    for _ in range(300):
        n_keys, n_partitions = rng.integers(0, 60), rng.integers(1, 20)
        per_command = int(rng.integers(1, 30))
        keys = rng.integers(-50, 50, n_keys)
        fixed = [b"HMGET", b"h%d"]
        case = KeyCommands(
            keys, n_partitions, range(n_partitions), b"%d:", fixed, per_command
        )
        case.check()


class RowCommands:
    """Rows of one partition, written by the kernel and by plain Python."""

    def __init__(self, n, row_bytes, prefix, fixed, per_command, low=0, high=None):
        rng = np.random.default_rng(n + row_bytes)
        self.keys = rng.integers(-(2**63), 2**63 - 1, n)
        self.rows = rng.integers(0, 256, (n, row_bytes), dtype=np.uint8)
        self.order = rng.permutation(n)
        self.low, self.high = low, n if high is None else high
        self.prefix, self.fixed, self.per_command = prefix, fixed, per_command

    def expected(self) -> list[bytes]:
        commands = []
        for first in range(self.low, self.high, self.per_command):
            arguments = []
            for i in self.order[first : min(first + self.per_command, self.high)]:
                arguments += [self.prefix + key_bytes(self.keys[i])]
                arguments += [self.rows[i].tobytes()]
            commands.append(command(*self.fixed, *arguments))
        return commands

    def size(self) -> tuple[int, int]:
        head, lead = len(head_of(*self.fixed)), len(lead_of(self.prefix))
        n = self.high - self.low
        row_bytes = self.rows.shape[1]
        return writing.row_commands_size(n, row_bytes, head, lead, self.per_command)

    def build(self, n_bytes: int, n_commands: int):
        whole, buf = guarded(n_bytes)
        ends = np.full(n_commands + 1, -7, np.int64)
        n = writing.build_row_commands(
            buf,
            ends[:-1],
            self.keys,
            self.rows,
            self.order,
            self.low,
            self.high,
            as_bytes(head_of(*self.fixed)),
            as_bytes(lead_of(self.prefix)),
            as_bytes(b"$%d\r\n" % self.rows.shape[1]),
            len(self.fixed),
            self.per_command,
        )
        assert guards_hold(whole)
        assert ends[-1] == -7
        return n, buf, ends[:-1]

    def check(self) -> None:
        commands = self.expected()
        n_bytes, n_commands = self.size()
        n, buf, ends = self.build(n_bytes, n_commands)
        assert n == len(commands) == n_commands
        assert ends[:n].tolist() == np.cumsum([len(c) for c in commands]).tolist()
        assert bytes(buf[: ends[n - 1] if n else 0]) == b"".join(commands)


@pytest.mark.parametrize("row_bytes", [1, 3, 31, 64, 100, 512, 516, 4096])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_commands_store_rows_under_their_keys(row_bytes, prefix):
    RowCommands(100, row_bytes, prefix, [b"MSET"], 16).check()
    RowCommands(40, row_bytes, prefix, [b"HSET", b"hps_et{T/p3}v"], 64).check()


def test_only_the_given_part_of_the_order_is_stored():
    RowCommands(100, 8, b"p:", [b"MSET"], 7, low=13, high=61).check()
    RowCommands(100, 8, b"p:", [b"MSET"], 7, low=30, high=30).check()


def test_rows_in_buffers_that_are_too_small_are_left_unfinished():
    case = RowCommands(50, 20, b"p:", [b"MSET"], 8)
    commands = case.expected()
    n_bytes, n_commands = case.size()
    assert case.build(n_bytes, n_commands)[0] == len(commands)
    for sizes in (
        (len(b"".join(commands)) - 1, n_commands),
        (0, n_commands),
        (n_bytes, n_commands - 1),
    ):
        assert case.build(*sizes)[0] == writing.NO_ROOM
