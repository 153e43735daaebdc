"""Reading keys of a slot while it is moved from one server to another.

Each key is on one of the two, and no command may name keys of both. So each key is
asked for by itself, many at once: first where the slot is, then, behind ``ASKING``,
where that server sends it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from redis.cluster import get_node_name
from redis.exceptions import AskError, MovedError, RedisError, ResponseError

from hps_numba.errors import TierUnavailableError
from hps_numba.tiers.redis.health import Health
from hps_numba.tiers.redis.layout import KEY_BYTES, pack
from hps_numba.tiers.redis.replies import Fate, fate_of, tier_error
from hps_numba.tiers.redis.table import RedisTable
from hps_numba.tiers.redis.topology import Node, Topology
from hps_numba.types import Keys

_HOPS = 6  # a key may move while it is followed
_AT_ONCE = 1024
_ASKING = pack(b"ASKING")


class Follower:
    """Reads keys wherever they are. Thread-safe.

    Parameters
    ----------
    topology
        Which server has what.
    health
        Which servers answer.
    """

    def __init__(self, topology: Topology, health: Health) -> None:
        self._topology = topology
        self._health = health

    def read(
        self, table: RedisTable, partition: int, keys: Keys
    ) -> Iterator[bytes | None]:
        """Yield the values of keys of one partition.

        Raises
        ------
        TierError
            If a server does not answer.
        """
        raw, layout = keys.tobytes(), table.layout
        names = [raw[i : i + KEY_BYTES] for i in range(0, len(raw), KEY_BYTES)]
        for low in range(0, len(names), _AT_ONCE):
            some = names[low : low + _AT_ONCE]
            if layout.has_hashes:
                commands = [pack(b"HMGET", layout.rows_key(partition), *some)]
            else:
                rows = [layout.row_key(partition, name) for name in some]
                commands = [pack(b"MGET", row) for row in rows]
            for values in self._answers(table, partition, commands):
                yield from values

    def _answers(
        self, table: RedisTable, partition: int, commands: list[bytes]
    ) -> list[Any]:
        """Return the reply to each command."""
        tag = table.spec.tag
        home = self._health.server_of(table.slots[partition])
        answers: list[Any] = [None] * len(commands)
        todo = {(home.name, False): list(range(len(commands)))}
        for _ in range(_HOPS):
            again: dict[tuple[str, bool], list[int]] = {}
            for (name, asking), which in todo.items():
                node = self._topology.server_at(name)
                self._health.check(node)
                replies = self._ask(node, [commands[i] for i in which], asking, tag)
                for i, reply in zip(which, replies, strict=True):
                    if not isinstance(reply, Exception):
                        answers[i] = reply
                        continue
                    where = self._sent_to(reply, node, tag)
                    again.setdefault(where or (home.name, False), []).append(i)
            todo = again
            if not todo:
                return answers
        raise TierUnavailableError(
            f"slot {table.slots[partition]} moves faster than its keys are followed",
            tier="redis",
            tag=tag,
        )

    def _sent_to(
        self, error: Exception, node: Node, tag: str
    ) -> tuple[str, bool] | None:
        """Return which server an error reply names, and if it has to be told so.

        None if it names none, and the owner of the slot is to be asked again.
        """
        if isinstance(error, MovedError):
            self._topology.moved(error)
            return _name(error), False
        if isinstance(error, AskError):
            return _name(error), True
        if fate_of(error) is Fate.MOVING:
            return None
        self._health.learn(node, fate_of(error), error)
        raise tier_error(error, node, tag)

    def _ask(
        self, node: Node, commands: list[bytes], asking: bool, tag: str
    ) -> list[Any]:
        sent = [_ASKING + command for command in commands] if asking else commands
        try:
            return _converse(node, b"".join(sent), len(commands), 1 + asking)
        except (RedisError, OSError) as exc:
            self._health.learn(node, fate_of(exc), exc)
            raise tier_error(exc, node, tag) from exc


def _name(error: AskError) -> str:
    return get_node_name(*error.node_addr)


def _converse(node: Node, text: bytes, n_commands: int, n_replies: int) -> list[Any]:
    """Send commands and return the last of the replies to each."""
    connection = node.connection()
    try:
        connection.send_packed_command([text])
        replies = [_reply(connection) for _ in range(n_commands * n_replies)]
    except BaseException:
        connection.disconnect()
        raise
    finally:
        node.give_back(connection)
    return replies[n_replies - 1 :: n_replies]


def _reply(connection: Any) -> Any:
    try:
        return connection.read_response(disable_decoding=True)
    except ResponseError as exc:
        return exc
