"""Arrays on a device: what callers give, and what they get.

Imports no CUDA package: those are reached through the device that a caller has already,
so that a machine without them can ask whether an array is on a device.
"""

from __future__ import annotations

import math
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hps_numba.runtime.arrays import check_length
from hps_numba.types import TableSpec

if TYPE_CHECKING:
    from hps_numba.kernels.cuda.gpu import Event, Gpu

# Both protocols name the default streams so: 0 would not say which of the two.
LEGACY_STREAM, THREAD_STREAM = 1, 2

_CUDA, _CUDA_MANAGED = 2, 13  # kinds of device in DLPack
_ON_HOST = (np.ndarray, list, tuple)
_NUMERIC = "biufc"


@dataclass(slots=True)  # frozen ones take longer to make
class DeviceView:
    """A contiguous array on a device, whoever made it.

    Parameters
    ----------
    address
        Of its first item.
    shape, dtype
        As in NumPy.
    stream
        Where its owner's work on it is queued, 1 and 2 for the default streams; None
        if nobody has to wait for any.
    owner
        Keeps the memory alive.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stream: int | None
    owner: object

    @property
    def size(self) -> int:
        """Number of items."""
        return math.prod(self.shape)


def is_on_device(x: Any) -> bool:
    """Return whether something is an array in the memory of a CUDA device."""
    if isinstance(x, _ON_HOST):
        return False
    ask = getattr(x, "__dlpack_device__", None)
    # Asked first: a tensor of torch has the other attribute in name only if it is on
    # the host, and computes all of it if it is not.
    if ask is not None:
        return int(ask()[0]) in (_CUDA, _CUDA_MANAGED)
    return hasattr(x, "__cuda_array_interface__")


def view(
    x: Any, *, gpu: Gpu, stream: int, what: str, writable: bool = False
) -> DeviceView:
    """Return where an array lies.

    Parameters
    ----------
    x
        An array with ``__cuda_array_interface__`` or DLPack.
    gpu
        The device that it has to be on.
    stream
        Handle of the stream that will use it.
    what
        What it is, for messages: ``"table hps_et.m.t: keys"``.
    writable
        Refuse an array that says it is read-only.

    Raises
    ------
    TypeError
        If it is no array on a device, or has a mask, or no plain numbers.
    ValueError
        If it is on another device, not contiguous, or cannot be written.

    Notes
    -----
    Never waits. An array that came by DLPack is ordered before ``stream`` already; for
    others see :func:`order`.
    """
    kind = type(x)
    if kind not in _by_dlpack:
        try:
            described = getattr(x, "__cuda_array_interface__", None)
        # torch has no such description of tensors with gradients, or of bfloat16.
        except (RuntimeError, KeyError):
            described = None
        if described is not None:
            # Without a stream in it, only DLPack tells what has to be waited for.
            if "stream" in described or not hasattr(kind, "__dlpack__"):
                return _described(described, x, gpu, what, writable)
            _by_dlpack.add(kind)
    return _over_dlpack(x, gpu, stream, what, writable)


def device_keys(keys: Any, spec: TableSpec, *, stream: int, gpu: Gpu) -> DeviceView:
    """Return where keys on a device lie: int64 or uint64, of any shape.

    Raises
    ------
    TypeError, ValueError
        If they are no such array, or more than a lookup may have.
    """
    found = view(keys, gpu=gpu, stream=stream, what=f"table {spec.tag}: keys")
    if found.dtype not in _KEY_DTYPES:
        raise TypeError(
            f"table {spec.tag}: keys on a device are int64 or uint64; got an array of "
            f"dtype {found.dtype} and shape {found.shape}"
        )
    _check_aligned(found, f"table {spec.tag}: keys")
    check_length(found.size, spec)
    return found


def device_output(
    out: Any, shape: tuple[int, ...], spec: TableSpec, *, stream: int, gpu: Gpu
) -> DeviceView:
    """Return where ``out`` lies, which takes the rows of keys of a shape.

    Raises
    ------
    TypeError, ValueError
        If it has another dtype or shape, or cannot be written.
    """
    what = f"table {spec.tag}: out"
    if not is_on_device(out):
        raise TypeError(
            f"{what} is an array on device {gpu.ordinal}, as the rows are; "
            f"got {type(out).__name__}"
        )
    found = view(out, gpu=gpu, stream=stream, what=what, writable=True)
    if found.dtype not in (np.float32, spec.numpy_dtype):
        other = "" if spec.dtype.value == "float32" else f" or {spec.dtype.value}"
        raise TypeError(f"{what} is an array of float32{other}; got {found.dtype}")
    full = (*shape, spec.dim)
    if found.shape != full:
        raise ValueError(f"{what} has shape {found.shape}; these keys need {full}")
    _check_aligned(found, what)
    return found


def order(array: DeviceView, stream: int, gpu: Gpu) -> None:
    """Let a stream wait for what an array's owner has queued; the caller does not."""
    if array.stream is None or array.stream == protocol_stream(stream):
        return
    event = _events.by_device.get(gpu.ordinal) or _new_event(gpu)
    event.record(array.stream)
    # The wait is for the mark as it is now, so that the event is free again.
    event.hold_up(stream)


def protocol_stream(stream: int) -> int:
    """Return a stream's handle as array protocols have it, which know no 0."""
    return stream or _default_stream


def _described(
    described: dict[str, Any], x: Any, gpu: Gpu, what: str, writable: bool
) -> DeviceView:
    """Read a CUDA array interface."""
    if described.get("mask") is not None:
        raise TypeError(f"{what}: masked arrays are not supported")
    shape = tuple(described["shape"])
    dtype = _dtype(described["typestr"], what)
    strides = described.get("strides")
    if strides is not None and not _contiguous(shape, strides, dtype.itemsize):
        raise _not_contiguous(what, shape, strides)
    address, read_only = described["data"]
    if writable and read_only:
        raise ValueError(f"{what} cannot be written: it is read-only")
    if address:
        _check_device(address, gpu, what)
    stream = described.get("stream")
    if stream == 0:
        raise ValueError(
            f"{what}: its stream is 0, which names no stream: "
            f"{LEGACY_STREAM} is the default one"
        )
    return DeviceView(address or 0, shape, dtype, stream, x)


def _over_dlpack(
    x: Any, gpu: Gpu, stream: int, what: str, writable: bool
) -> DeviceView:
    ask = getattr(x, "__dlpack_device__", None)
    if ask is None:
        raise TypeError(
            f"{what}: an array with __cuda_array_interface__ or __dlpack__ is needed; "
            f"got {type(x).__name__}"
        )
    kind, ordinal = ask()
    if int(kind) != _CUDA:
        raise TypeError(
            f"{what}: memory of a CUDA device is needed, DLPack's kind {_CUDA}; got "
            f"kind {int(kind)}"
        )
    if ordinal != gpu.ordinal:
        raise _elsewhere(what, ordinal, gpu)
    if writable and getattr(x, "requires_grad", False):
        raise ValueError(f"{what} wants gradients: pass out.detach()")
    from hps_numba.kernels.cuda.interchange import import_dlpack

    try:
        found = import_dlpack(x, protocol_stream(stream))
        dtype = found.dtype
    except (BufferError, RuntimeError, TypeError) as exc:
        raise TypeError(f"{what}: {exc}") from exc
    if found.strides is not None and not _contiguous(found.shape, found.strides, 1):
        raise _not_contiguous(what, found.shape, found.strides)
    if writable and found.readonly:
        raise ValueError(f"{what} cannot be written: it is read-only")
    return DeviceView(found.ptr, tuple(found.shape), dtype, None, found)


def _dtype(typestr: str, what: str) -> np.dtype[Any]:
    found = _dtypes.get(typestr)
    if found is None:
        try:
            found = np.dtype(typestr)
        except TypeError as exc:
            raise TypeError(f"{what}: no dtype is named {typestr!r}") from exc
        if found.kind not in _NUMERIC:
            raise TypeError(f"{what}: plain numbers are needed; got {typestr!r}")
        _dtypes[typestr] = found
    return found


def _contiguous(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int
) -> bool:
    """Return whether items follow each other, the last axis first."""
    if 0 in shape:
        return True
    expected = itemsize
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True


def _check_device(address: int, gpu: Gpu, what: str) -> None:
    """Refuse memory of another device; with one device there is none."""
    from hps_numba.kernels.cuda import interchange

    if interchange.n_devices() == 1:
        return
    ordinal = interchange.device_of(address)
    if ordinal is None:
        raise ValueError(f"{what}: {address:#x} is in no memory of a device")
    if ordinal != gpu.ordinal:
        raise _elsewhere(what, ordinal, gpu)


def _check_aligned(found: DeviceView, what: str) -> None:
    if found.address % found.dtype.itemsize:
        raise ValueError(
            f"{what} begin at {found.address:#x}, which is no multiple of their "
            f"{found.dtype.itemsize} bytes"
        )


def _elsewhere(what: str, ordinal: int, gpu: Gpu) -> ValueError:
    return ValueError(
        f"{what}: the array is on device {ordinal}, the cache on {gpu.ordinal}"
    )


def _not_contiguous(what: str, shape: Any, strides: Any) -> ValueError:
    return ValueError(
        f"{what} must be contiguous; shape {tuple(shape)} has strides {tuple(strides)}"
    )


def _new_event(gpu: Gpu) -> Event:
    from hps_numba.kernels.cuda.gpu import Event

    event = _events.by_device[gpu.ordinal] = Event(gpu)
    return event


class _Events(threading.local):
    """An event a device for each thread: nobody records between a mark and its wait."""

    def __init__(self) -> None:
        self.by_device: dict[int, Event] = {}


_KEY_DTYPES = (np.dtype(np.int64), np.dtype(np.uint64))
# cuda.bindings calls the driver's functions for per-thread streams if this is set.
_default_stream = (
    THREAD_STREAM
    if os.environ.get("CUDA_PYTHON_CUDA_PER_THREAD_DEFAULT_STREAM", "0") == "1"
    else LEGACY_STREAM
)
_dtypes: dict[str, np.dtype[Any]] = {}
_by_dlpack: set[type] = set()
_events = _Events()
