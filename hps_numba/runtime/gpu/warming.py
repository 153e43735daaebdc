"""Which keys a GPU cache is warmed up with, the most wanted first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hps_numba.config import InferenceParams
from hps_numba.errors import ConfigError
from hps_numba.tiers.model_files.directory import ModelDirectory, is_ascending
from hps_numba.types import Keys

BLOCK_KEYS = 65_536


@dataclass(frozen=True, eq=False)
class WarmKeys:
    """Keys in the order in which they are worth a place.

    Parameters
    ----------
    total
        Keys in all blocks together.
    blocks
        int64 (n,), n at least 1; no key comes twice. To be iterated once.
    """

    total: int
    blocks: Iterator[Keys]


def warm_keys(
    params: InferenceParams,
    index: int,
    directory: ModelDirectory | None,
    *,
    limit: int | None = None,
) -> WarmKeys:
    """Return the keys to warm up a table with.

    They are those of its frequency file, or else the first of its model directory, in
    the order of the file; none if there is neither, or if ``init_ec`` is false.

    Parameters
    ----------
    params
        The model.
    index
        Position of the table.
    directory
        The table's model directory, or None.
    limit
        Most keys to return; ``warm_up_rows_per_table`` may ask for fewer.

    Raises
    ------
    ConfigError
        If the frequency file cannot be read.

    Notes
    -----
    Takes 24 bytes of memory a key at most; none for the first keys of a model directory
    that is sorted.
    """
    wanted = (params.warm_up_rows_per_table or ())[index : index + 1]
    limits = [n for n in (limit, *wanted) if n is not None]
    keys: NDArray[Any] = np.zeros(0, np.int64)
    frequencies = frequency_file(params, index)
    if frequencies is not None:
        keys = _by_frequency(frequencies)
    elif directory is not None and params.init_ec:
        keys = directory.raw_keys
    keys = _distinct(keys, min([keys.size, *limits]))
    return WarmKeys(keys.size, _blocks(keys))


def frequency_file(params: InferenceParams, index: int) -> NDArray[np.int64] | None:
    """Return the content of a table's frequency file, mapped; None without one.

    Raises
    ------
    ConfigError
        If it is anything else than int64 (n,) or (n, 2) in NumPy's format.
    """
    paths = params.warm_up_keys_per_table
    if not params.init_ec or not paths or not paths[index]:
        return None
    where = (
        f"table {params.tables()[index].tag}: warm_up_keys_per_table: {paths[index]}"
    )
    try:
        content: NDArray[Any] = np.lib.format.open_memmap(paths[index], mode="r")
    except OSError as exc:
        raise ConfigError(f"{where}: cannot be read: {exc.strerror}") from exc
    except (ValueError, EOFError) as exc:
        raise ConfigError(f"{where}: is no whole .npy file: {exc}") from exc
    if content.dtype != np.int64 or (content.ndim != 1 and content.shape[1:] != (2,)):
        raise ConfigError(
            f"{where}: holds {content.dtype} {content.shape}; keys, the most frequent "
            f"first, are int64 (n,), and keys with their counts int64 (n, 2)"
        )
    return content


def _by_frequency(content: NDArray[np.int64]) -> Keys:
    """Return the keys of a frequency file, the most frequent first."""
    if content.ndim == 1:
        return content
    keys: Keys
    keys, counts = content.T
    return keys[np.argsort(~counts, kind="stable")]  # ~ falls, and cannot overflow


def _distinct(keys: NDArray[Any], n_keys: int) -> NDArray[Any]:
    """Return the first ``n_keys`` keys that differ, in their order."""
    if is_ascending(keys[:n_keys]):
        return keys[:n_keys]
    size = n_keys
    while True:
        part = keys[:size]
        order = np.argsort(part, kind="stable")
        ordered = part[order]
        repeated = order[1:][ordered[1:] == ordered[:-1]]
        if size - repeated.size >= n_keys or size == keys.size:
            return np.delete(part, repeated)[:n_keys]
        size = min(2 * size, keys.size)


def _blocks(keys: NDArray[Any]) -> Iterator[Keys]:
    for start in range(0, keys.size, BLOCK_KEYS):
        yield np.ascontiguousarray(keys[start : start + BLOCK_KEYS], np.int64)
