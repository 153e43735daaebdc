"""What a trainer publishes new rows with."""

from __future__ import annotations

import atexit
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import monotonic
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import Self

from hps_numba.errors import ClosedError, ConfigError, UpdateSourceError
from hps_numba.runtime.arrays import as_keys, as_rows
from hps_numba.runtime.updates.frames import HEADER_BYTES, RawRows
from hps_numba.runtime.updates.lanes import OVERHEAD_BYTES, Lane, spread
from hps_numba.runtime.updates.outbox import Outbox, ProducerStats
from hps_numba.types import Keys, RowDtype, Rows, TableSpec

_TOPIC = re.compile(r"(?=.{1,249}$)hps_et\.[A-Za-z0-9._-]+\.[A-Za-z0-9._-]+")
_OWN_SETTINGS = ("bootstrap.servers", "error_cb", "transactional.id")
_GRACE_S = 1.0  # for the report of a message that was given up in the last moment


class UpdateProducer:
    """Publishes rows and deletions of tables to the servers that follow their topics.

    ::

        with UpdateProducer("localhost:9092") as producer:
            producer.send("wdl", "item", keys, rows)
            producer.delete("wdl", "item", old_keys)

    Parameters
    ----------
    brokers
        ``host:port``, separated by commas.
    num_partitions
        Groups that keys are spread over by their hash. Group ``g`` goes to partition
        ``g % n`` of a topic with ``n`` partitions, so more than this are of no use.
    message_bytes
        Most bytes of a message, its overhead included. What Kafka brokers take unless
        configured otherwise is 1,048,588.
    linger_ms
        How long a row waits for its message to fill up.
    queue_bytes
        Most bytes that wait, half of them for their messages to fill up and half for
        brokers; a send beyond that waits, too.
    timeout_s
        How long a send waits, and after which a message is given up.
    settings
        Of librdkafka: compression, SASL, TLS and whatever else it has. They win over
        what is set here, but for idempotence, without which order is not kept.

    Raises
    ------
    ConfigError
        If settings contradict one another, or librdkafka does not know one.

    Notes
    -----
    Rows and deletions of a key arrive in the order of the calls, each once, as long as
    the producer lives and the topic's number of partitions stays. They are delivered
    when ``flush`` or ``close`` returns. A message that was lost is the error of the
    next call, whatever that is about; later ones may have been delivered.

    Thread-safe. Not to be used in a process forked off since.
    """

    def __init__(  # noqa: PLR0913 -- one parameter per setting
        self,
        brokers: str,
        *,
        num_partitions: int = 8,
        message_bytes: int = 1 << 20,
        linger_ms: float = 5.0,
        queue_bytes: int = 64 << 20,
        timeout_s: float = 30.0,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if num_partitions < 1:
            raise ConfigError(f"num_partitions={num_partitions}: at least 1")
        if queue_bytes < 2 * message_bytes:
            raise ConfigError(
                f"queue_bytes={queue_bytes}: at least two messages of "
                f"{message_bytes} bytes (message_bytes)"
            )
        self._num_partitions = num_partitions
        self._message_bytes = message_bytes
        self._linger_s = linger_ms / 1000
        self._max_held_bytes = queue_bytes // 2
        self._timeout_s = timeout_s
        self._pid = os.getpid()
        ours = {
            "acks": "all",
            "linger.ms": 0,  # messages are packed already
            "message.max.bytes": max(message_bytes, 1_000_000),
            "message.timeout.ms": int(timeout_s * 1000),
            "queue.buffering.max.kbytes": queue_bytes // 2 // 1024,
        }
        self._outbox = Outbox(brokers, {**ours, **_checked(settings or {})})
        self._lock = threading.Lock()
        # Guarded by _lock. A lane's records are put in the order in which they came.
        self._lanes: dict[str, list[Lane]] = {}
        self._dims: dict[str, int] = {}
        self._held_bytes = 0  # of all lanes
        self._closed = False
        self._filling = threading.Event()  # whether a lane may have records
        self._closing = threading.Event()
        self._shipper = threading.Thread(
            target=self._ship_when_due, name="hps-numba-producer", daemon=True
        )
        self._shipper.start()
        atexit.register(self.close)

    def send(self, model: str, table: str, keys: ArrayLike, rows: ArrayLike) -> None:
        """Publish new rows of keys.

        Returns when the rows are on their way; they are copied.

        Parameters
        ----------
        model, table
            The table, whose topic is ``hps_et.<model>.<table>``.
        keys
            Integers (n,). Of a key that repeats the last row counts.
        rows
            (n, dim). float16 is sent as such, all else as float32.

        Raises
        ------
        UpdateSourceError
            If an earlier message was lost; if brokers do not answer, or take what is
            queued in time; if there is no such topic. Not all of these rows were taken
            then, and to send them again does no harm.
        TypeError, ValueError
            If keys or rows do not fit; nothing is sent then.
        ClosedError
            If the producer was closed.
        """
        spec, flat = _keys_of(model, table, keys)
        given = self._rows_of(spec, rows, flat.size)
        self._submit(spec.tag, flat, given)

    def delete(self, model: str, table: str, keys: ArrayLike) -> None:
        """Publish that keys (n,) are gone; raises as ``send``.

        Servers of HugeCTR HPS ignore it.
        """
        spec, flat = _keys_of(model, table, keys)
        self._submit(spec.tag, flat, None)

    def flush(self, timeout_s: float | None = None) -> None:
        """Wait until everything sent so far was delivered.

        Parameters
        ----------
        timeout_s
            How long; by default until each message was delivered or given up.

        Raises
        ------
        UpdateSourceError
            If a message was lost, or if it takes longer.
        ClosedError
            If the producer was closed.
        """
        deadline = self._deadline(timeout_s)
        with self._turn():
            self._ship(self._all_lanes(), deadline)
        self._outbox.flush(deadline)
        self._outbox.raise_losses()

    def close(self) -> None:
        """Deliver what was sent, and end; may be called twice.

        Raises
        ------
        UpdateSourceError
            If messages were lost, or could not be delivered in time.
        """
        atexit.unregister(self.close)
        if self._pid != os.getpid():
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._closing.set()
        self._filling.set()
        self._shipper.join()
        deadline = self._deadline(None)
        try:
            self._ship(self._all_lanes(), deadline)
            self._outbox.flush(deadline)
        except UpdateSourceError as exc:
            n_left = sum(lane.n_records for lane in self._all_lanes())
            n_left += self._outbox.give_up()
            raise UpdateSourceError(f"{n_left} records are lost: {exc}") from exc
        self._outbox.raise_losses()

    def stats(self) -> ProducerStats:
        """Return what was acknowledged, lost, and is on its way."""
        return self._outbox.stats()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _rows_of(self, spec: TableSpec, rows: ArrayLike, n_keys: int) -> Rows:
        """Return rows as they are sent; a table's rows all have one dim."""
        array = np.asarray(rows)
        dim = self._dims.get(spec.tag) or (array.shape[1] if array.ndim == 2 else 1)
        half = array.dtype == np.float16
        dtype = RowDtype.FLOAT16 if half else RowDtype.FLOAT32
        given = as_rows(array, n_keys, TableSpec(spec.model, spec.name, dim, dtype))
        room = self._message_bytes - OVERHEAD_BYTES - HEADER_BYTES - 8
        if not 0 < given.itemsize * dim <= room:
            raise ValueError(
                f"table {spec.tag}: rows of {dim} values do not fit into messages of "
                f"{self._message_bytes} bytes (message_bytes)"
            )
        self._dims.setdefault(spec.tag, dim)
        return given

    def _submit(self, topic: str, keys: Keys, rows: Rows | None) -> None:
        """Give records to their lanes, and ship what is full."""
        raw = np.empty((len(keys), 0), np.uint8) if rows is None else rows.view("u1")
        deadline = self._deadline(None)
        with self._turn():
            self._outbox.raise_losses()
            lanes = self._lanes_of(topic)
            for lane, picked in spread(keys, lanes, self._num_partitions):
                self._add(lane, keys, raw, picked, deadline)
        self._filling.set()

    def _add(
        self,
        lane: Lane,
        keys: Keys,
        raw_rows: RawRows,
        picked: NDArray[np.int64],
        deadline: float,
    ) -> None:
        """Fill a lane's messages one by one with the records at some positions."""
        while len(picked):
            n = lane.room(raw_rows.shape[1])
            if not n:
                self._ship([lane], deadline)
                continue
            held_bytes = lane.held_bytes
            lane.add(keys, raw_rows, picked[:n])
            picked = picked[n:]
            self._held_bytes += lane.held_bytes - held_bytes
            if self._held_bytes > self._max_held_bytes:
                self._ship_and_release(deadline)

    def _ship(self, lanes: list[Lane], deadline: float) -> None:
        """Put the messages of lanes, as far as they have any, into the outbox."""
        for lane in lanes:
            if lane.n_records:
                self._outbox.put(lane.parcel(), deadline)
                lane.clear()

    def _ship_and_release(self, deadline: float) -> None:
        """Give the memory of all lanes back, which may be those of many topics."""
        lanes = self._all_lanes()
        self._ship(lanes, deadline)
        for lane in lanes:
            lane.release()
        self._held_bytes = 0

    def _ship_when_due(self) -> None:
        """Ship what waits for longer than the linger time, until the end."""
        while True:
            self._filling.wait()
            with self._lock:
                if self._closed:
                    return
                wait_s = self._ship_due_locked()
            if wait_s is None:  # the queue is full
                self._outbox.wait()
            else:
                self._closing.wait(wait_s)

    def _ship_due_locked(self) -> float | None:
        """Ship what is due; return seconds to wait then, or None: it is full."""
        is_full = False
        next_s = monotonic() + self._linger_s
        due_s = monotonic() - self._linger_s
        self._filling.clear()
        for lane in self._all_lanes():
            if not lane.n_records:
                continue
            self._filling.set()
            if lane.born_s > due_s:
                next_s = min(next_s, lane.born_s + self._linger_s)
            elif self._outbox.try_put(lane.parcel()):
                lane.clear()
            else:
                is_full = True
        return None if is_full else max(0.0, next_s - monotonic())

    def _all_lanes(self) -> list[Lane]:
        return [lane for lanes in self._lanes.values() for lane in lanes]

    def _lanes_of(self, topic: str) -> list[Lane]:
        """Return a lane for each partition of a topic, which is asked for once."""
        if topic not in self._lanes:
            n_lanes = min(
                self._outbox.partitions(topic, self._timeout_s), self._num_partitions
            )
            self._lanes[topic] = [
                Lane(topic, partition, self._message_bytes)
                for partition in range(n_lanes)
            ]
        return self._lanes[topic]

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the lock of an open producer."""
        if self._pid != os.getpid():
            raise UpdateSourceError(
                "this producer is that of the parent process; make one after the fork"
            )
        if not self._lock.acquire(timeout=self._timeout_s):
            raise UpdateSourceError("other threads wait for the brokers, too")
        try:
            if self._closed:
                raise ClosedError("the producer was closed")
            yield
        finally:
            self._lock.release()

    def _deadline(self, timeout_s: float | None) -> float:
        """Return when a call gives up; by default once messages are given up."""
        if timeout_s is None:
            timeout_s = self._timeout_s + _GRACE_S
        return monotonic() + timeout_s


def _keys_of(model: str, table: str, keys: ArrayLike) -> tuple[TableSpec, Keys]:
    """Return a table, and keys as they are sent."""
    spec = TableSpec(model, table, dim=1)
    if not _TOPIC.fullmatch(spec.tag):
        raise ValueError(
            f"table {spec.tag!r} cannot be a Kafka topic: model and table are made of "
            f"letters, digits, '.', '_' and '-', and a topic has 249 of them at most"
        )
    flat = as_keys(keys, spec)
    if flat.ndim != 1:
        raise ValueError(f"table {spec.tag}: keys are (n,); got shape {flat.shape}")
    return spec, flat


def _checked(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Refuse settings that would break what is promised."""
    for name in _OWN_SETTINGS:
        if name in settings:
            raise ConfigError(f"Kafka setting {name} is not for callers to set")
    return {**settings, "enable.idempotence": True}
