"""Stand-in for device memory: what kernels may touch, and nothing else."""

from __future__ import annotations

import array as arrays
import bisect
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_ALIGNMENT = 256
_GAP_BYTES = 256  # between two allocations, so that running over one never hits another


@dataclass(frozen=True)
class Allocation:
    """What an allocation is, in words, and the array that owns its bytes."""

    what: str
    owner: npt.NDArray[np.uint8]


class DeviceMemory:
    """Arrays whose bytes are all that a kernel may touch.

    Notes
    -----
    Safe from several threads. A launch sees the allocations there were when it started.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._allocations: dict[int, Allocation] = {}  # guarded by _lock
        # Where allocations begin and end, both ascending.
        self._lows = arrays.array("Q")  # guarded by _lock
        self._highs = arrays.array("Q")  # guarded by _lock
        self._n_made = 0  # guarded by _lock

    def array(self, shape: int | tuple[int, ...], dtype: Any, fill: Any = 0) -> Any:
        """Allocate an array, aligned to 256 bytes.

        Parameters
        ----------
        shape, dtype
            As of :func:`numpy.empty`.
        fill
            Value of each element.
        """
        kind = np.dtype(dtype)
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        n_bytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        owner = np.empty(n_bytes + 2 * _GAP_BYTES + _ALIGNMENT, np.uint8)
        start = _GAP_BYTES + -(owner.ctypes.data + _GAP_BYTES) % _ALIGNMENT
        array = owner[start : start + n_bytes].view(kind).reshape(shape)
        array[...] = fill
        low = owner.ctypes.data + start
        with self._lock:
            what = f"allocation {self._n_made} ({kind}, shape {shape}, {n_bytes} bytes)"
            self._n_made += 1
            self._allocations[low] = Allocation(what, owner)
            bisect.insort(self._lows, low)
            bisect.insort(self._highs, low + n_bytes)
        return array

    def copy(self, array: npt.ArrayLike) -> Any:
        """Allocate an array and copy another one into it."""
        given = np.asarray(array)
        made = self.array(given.shape, given.dtype)
        made[...] = given
        return made

    def address(self, array: Any) -> int:
        """Return the address of an array, or of a view of one.

        Raises
        ------
        ValueError
            If it lies in no allocation of this memory.
        """
        address = int(array.ctypes.data)
        with self._lock:
            place = bisect.bisect_right(self._lows, address) - 1
            if place >= 0 and address <= self._highs[place]:
                return address
        raise ValueError(f"the array at {address:#x} is not of this device memory")

    def free(self, array: Any) -> None:
        """Forget an allocation: touching it is out of bounds from now on.

        Raises
        ------
        ValueError
            If the array is no allocation of this memory, or has been freed.
        """
        address = int(array.ctypes.data)
        with self._lock:
            if self._allocations.pop(address, None) is None:
                raise ValueError("the array is no allocation, or has been freed")
            place = bisect.bisect_left(self._lows, address)
            del self._lows[place], self._highs[place]

    def ranges(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """Return where allocations begin and end, by ascending address."""
        with self._lock:
            return np.array(self._lows, np.uint64), np.array(self._highs, np.uint64)

    def describe(self, low: int) -> str:
        """Return words for the allocation that begins at an address."""
        with self._lock:
            known = self._allocations.get(low)
        return known.what if known else f"an allocation at {low:#x}, freed meanwhile"
