"""What ``hps-numba produce`` publishes, and from where."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hps_numba.errors import ConfigError, ModelFileError
from hps_numba.tiers.model_files import open_model_directory
from hps_numba.types import Progress, table_tag

if TYPE_CHECKING:
    from hps_numba.runtime.updates.producer import UpdateProducer

_BLOCK_ROWS = 16_384


@dataclass(frozen=True)
class KeysAndRows:
    """What is to be published: keys (n,), and rows (n, dim) unless it is deleted."""

    keys: NDArray[Any]
    rows: NDArray[Any] | None

    def blocks(self) -> Iterator[tuple[NDArray[Any], NDArray[Any] | None]]:
        """Yield keys and rows in pieces, in order."""
        for start in range(0, len(self.keys), _BLOCK_ROWS):
            part = slice(start, start + _BLOCK_ROWS)
            yield self.keys[part], None if self.rows is None else self.rows[part]


@dataclass(frozen=True)
class Published:
    """What was delivered to the brokers."""

    topic: str
    deleted: bool
    rows: int
    messages: int
    bytes: int
    seconds: float


def read_source(source: Path, *, delete: bool, dim: int | None = None) -> KeysAndRows:
    """Return what a model directory or an ``.npz`` file holds.

    Parameters
    ----------
    source
        A directory with ``key`` and ``emb_vector``, or a file with the arrays ``keys``
        and ``rows``.
    delete
        Whether the keys alone are wanted, and may be alone in the file.
    dim
        Values per row of a model directory, if its sizes do not tell.

    Raises
    ------
    ModelFileError
        If there is no such source, or arrays are missing or do not fit together.
    """
    if source.suffix != ".npz":
        files = open_model_directory(source, dim)
        return KeysAndRows(files.raw_keys, None if delete else files.rows)
    wanted = ("keys",) if delete else ("keys", "rows")
    try:
        with np.load(source) as arrays:
            found = {name: arrays[name] for name in wanted if name in arrays}
    except (OSError, ValueError, zipfile.BadZipFile) as exc:
        raise ModelFileError(f"{source}: {exc}") from exc
    if missing := set(wanted) - set(found):
        raise ModelFileError(f"{source}: has no array {' and '.join(sorted(missing))}")
    keys, rows = found["keys"], found.get("rows")
    if keys.ndim != 1 or keys.dtype.kind not in "iu":
        raise ModelFileError(
            f"{source}: keys are integers (n,); got {keys.dtype} {keys.shape}"
        )
    if rows is not None and rows.dtype.kind not in "fiu":
        raise ModelFileError(f"{source}: rows are numbers (n, dim); got {rows.dtype}")
    if rows is not None and (rows.ndim != 2 or len(rows) != len(keys)):
        raise ModelFileError(
            f"{source}: rows of {len(keys)} keys are ({len(keys)}, dim); "
            f"got {rows.shape}"
        )
    return KeysAndRows(keys, rows)


def open_producer(
    brokers: str, *, partitions: int, message_bytes: int, settings: Mapping[str, str]
) -> UpdateProducer:
    """Return a producer; ``ConfigError`` says how to get what it needs."""
    try:
        from hps_numba.runtime.updates.producer import UpdateProducer
    except ModuleNotFoundError as exc:
        if exc.name != "confluent_kafka":
            raise
        raise ConfigError(
            'confluent-kafka is not installed; pip install "hps-numba[kafka]"'
        ) from exc
    return UpdateProducer(
        brokers,
        num_partitions=partitions,
        message_bytes=message_bytes,
        queue_bytes=max(64 << 20, 2 * message_bytes),
        settings=settings,
    )


def publish(
    producer: UpdateProducer,
    model: str,
    table: str,
    source: KeysAndRows,
    *,
    progress: Progress,
) -> Published:
    """Publish a source, and wait until all of it is delivered."""
    began_s, before = monotonic(), producer.stats()
    for keys, rows in source.blocks():
        if rows is None:
            producer.delete(model, table, keys)
        else:
            producer.send(model, table, keys, rows)
        progress(len(keys))
    producer.flush()
    after = producer.stats()
    return Published(
        table_tag(model, table),
        source.rows is None,
        after.rows - before.rows,
        after.messages - before.messages,
        after.bytes - before.bytes,
        monotonic() - began_s,
    )


def parse_settings(given: Sequence[str]) -> dict[str, str]:
    """Return ``name=value`` as a dictionary; ``ValueError`` for anything else."""
    settings = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"{text!r} is not name=value")
        settings[name] = value
    return settings
