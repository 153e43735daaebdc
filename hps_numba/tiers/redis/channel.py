"""One connection that reads rows: commands out, replies parsed into their places.

The connection is redis-py's, opened, authenticated and encrypted by it; its socket is
driven here, without waiting, since every row passes through. A channel that fails in
the middle of a reply is closed: its connection never serves anybody again.
"""

from __future__ import annotations

import select
import ssl
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from redis.exceptions import InvalidResponse

from hps_numba.kernels.host import resp_read as read
from hps_numba.kernels.host import resp_write as write
from hps_numba.tiers.redis.client import raw_socket
from hps_numba.tiers.redis.layout import Bytes, CommandText, Numbers
from hps_numba.tiers.redis.topology import Node
from hps_numba.types import Keys, Mask

KEYS_PER_COMMAND = 512
COMMANDS_IN_FLIGHT = 8
_INPUT_BYTES = 256 << 10
_AGAIN = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


@dataclass(frozen=True)
class Batch:
    """Keys to read, partition by partition, and where their rows go."""

    text: CommandText
    header: Bytes  # what precedes a row in a reply
    keys: Keys
    order: Numbers  # positions of the keys that are asked for
    bounds: Numbers  # of each partition in order
    out: Bytes  # (n, row_bytes)
    found: Mask
    asked: Callable[[], None] | None = None  # called when all commands are on their way


@dataclass(frozen=True)
class Trouble:
    """Keys that a server did not answer, and why."""

    node: Node
    targets: NDArray[np.int64]  # their positions
    error: str | Exception  # an error reply, or what became of the connection


class Channel:
    """A connection to one server. Used by one thread at a time.

    Parameters
    ----------
    node
        The server; connecting may raise what redis-py raises.
    """

    def __init__(self, node: Node) -> None:
        self.node = node
        self._connection = node.connection()
        self._closed = False
        try:
            self._socket = raw_socket(self._connection)
            self._socket.settimeout(0)
        except BaseException:
            self.close()
            raise
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._input = np.empty(_INPUT_BYTES, np.uint8)
        self._output = np.empty(0, np.uint8)
        self._ends = np.empty(0, np.int64)
        self._key_ends = np.empty(0, np.int64)
        self._targets = np.empty(0, np.int64)
        self._received = 0  # bytes in _input that are not parsed
        self._sent = 0  # bytes of _output that are on their way
        self._state = read.new_state()
        self.troubles: list[Trouble] = []

    @property
    def fileno(self) -> int:
        """The socket's descriptor."""
        return int(self._socket.fileno())

    @property
    def quiet(self) -> bool:
        """Whether the server neither hung up nor sent what nobody asked for.

        Half a push message that came behind the last reply would stand before the
        next one: such a channel is of no more use.
        """
        waiting = self._received > 0 or _pending(self._socket)
        return not waiting and not self._poll.poll(0)

    @property
    def wrong(self) -> tuple[int, int, int]:
        """How many values have another width; the first one's position and bytes."""
        state = self._state
        return (
            int(state[read.P_WRONG]),
            int(state[read.P_WRONG_TARGET]),
            int(state[read.P_WRONG_WIDTH]),
        )

    @property
    def wants_to_send(self) -> bool:
        """Whether a command may go out now."""
        return self._sent < self._allowed()

    @property
    def has_to_send(self) -> bool:
        """Whether commands are left that are not on their way."""
        return self._ends.size > 0 and self._sent < self._ends[-1]

    def ask(self, batch: Batch, partitions: Numbers) -> None:
        """Begin to read the keys of some partitions."""
        text, bounds = batch.text, batch.bounds
        n_keys = int((bounds[partitions + 1] - bounds[partitions]).sum())
        n_bytes, n_commands = write.key_commands_size(
            n_keys, partitions.size, text.max_head, text.max_lead, KEYS_PER_COMMAND
        )
        if self._output.size < n_bytes:
            self._output = np.empty(n_bytes, np.uint8)
        ends, key_ends = np.empty(n_commands, np.int64), np.empty(n_commands, np.int64)
        self._targets = np.empty(n_keys, np.int64)
        n_commands = write.build_key_commands(
            self._output,
            ends,
            key_ends,
            self._targets,
            batch.keys,
            batch.order,
            bounds,
            partitions,
            text.heads,
            text.head_at,
            text.leads,
            text.lead_at,
            text.n_fixed,
            KEYS_PER_COMMAND,
        )
        self._ends, self._key_ends = ends[:n_commands], key_ends[:n_commands]
        if self._input.size < 2 * (batch.out.shape[1] + batch.header.size):
            self._input = np.empty(
                2 * (batch.out.shape[1] + batch.header.size), np.uint8
            )
        self._batch = batch
        self._received = self._sent = 0
        self._state = read.new_state()
        self.troubles = []

    def send(self) -> None:
        """Send what may be sent and goes out without waiting."""
        view = memoryview(self._output.data)
        try:
            while self._sent < (end := self._allowed()):
                self._sent += self._socket.send(view[self._sent : end])
        except _AGAIN:
            pass

    def receive(self) -> bool:
        """Take what has arrived; return whether all commands are answered.

        Raises
        ------
        OSError
            If the connection is lost.
        InvalidResponse
            If what arrives is no answer.
        """
        view = memoryview(self._input.data)
        while True:
            try:
                n_bytes = self._socket.recv_into(view[self._received :])
            except _AGAIN:
                return False
            if n_bytes == 0:
                raise ConnectionResetError("the server closed the connection")
            full = self._received + n_bytes == len(view)
            if self._parse(self._received + n_bytes):
                return True
            if not full and not _pending(self._socket):
                return False

    def give_up(self, error: Exception) -> None:
        """Note that the rest is not answered, and close.

        Of a server that broke the protocol nothing counts, what it said before neither.
        """
        answered = int(self._state[read.P_KEY])
        if isinstance(error, InvalidResponse):
            self._batch.found[self._targets] = False
            self._state = read.new_state()
            self.troubles = []
            answered = 0
        self.troubles.append(Trouble(self.node, self._targets[answered:], error))
        self.close()

    def close(self) -> None:
        """Close the connection; the second call does nothing."""
        if not self._closed:
            self._closed = True  # its pool lends what it is given twice to two threads
            self._connection.disconnect()
            self.node.give_back(self._connection)

    def _allowed(self) -> int:
        """Return how many bytes may be sent while so many replies are missing."""
        if not self._ends.size:
            return 0
        last = int(self._state[read.P_REPLY]) + COMMANDS_IN_FLIGHT
        return int(self._ends[min(last, self._ends.size) - 1])

    def _parse(self, high: int) -> bool:
        """Take the replies in ``_input[:high]``; return whether they are the last."""
        batch, low = self._batch, 0
        while True:
            status, low = read.parse_rows(
                self._input,
                low,
                high,
                self._state,
                self._key_ends,
                batch.out,
                self._targets,
                batch.found,
                batch.header,
            )
            if status == read.DONE:
                self._received = high - low
                return True
            if status == read.MORE:
                break
            bad = status == read.BAD
            end = read.MALFORMED if bad else read.end_of_reply(self._input, low, high)
            if end == read.INCOMPLETE:
                break
            if end == read.MALFORMED:
                raise InvalidResponse("the reply does not fit the command")
            if status == read.ERROR:
                self._note_error(bytes(self._input[low:end]))
            low = end
        self._received = read.move_tail(self._input, low, high)
        if self._received == self._input.size:
            raise InvalidResponse("the reply is longer than any row")
        return False

    def _note_error(self, reply: bytes) -> None:
        """Note the keys of a command that was refused."""
        command = int(self._state[read.P_REPLY])
        low = self._key_ends[command - 1] if command else 0
        targets = self._targets[low : self._key_ends[command]]
        text = reply[1:].strip().decode("utf-8", "replace")
        self.troubles.append(Trouble(self.node, targets, text))
        read.skip_command(self._state, self._key_ends)


def _pending(socket: object) -> bool:
    """Whether bytes wait that poll does not know of, since they are decrypted."""
    return isinstance(socket, ssl.SSLSocket) and socket.pending() > 0
