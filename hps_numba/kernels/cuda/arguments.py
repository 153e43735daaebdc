"""Arguments of a kernel, laid out as the driver reads them."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

from hps_numba.kernels.cuda.compiling import KernelSpec

# Every argument has 8 bytes, of which a narrow one fills the first 4.
_BYTES = 8
_FORMATS = {"U": "Q", "u": "I4x", "I": "q", "i": "i4x", "f": "f4x"}


class PackedArguments:
    """One launch's arguments, each in exactly its parameter's type.

    Nothing is guessed from a Python value: an int becomes 4 or 8 bytes, signed or
    unsigned, as the kernel was compiled, and a float four.

    Parameters
    ----------
    spec
        The kernel.

    Notes
    -----
    For one launch at a time.
    """

    def __init__(self, spec: KernelSpec) -> None:
        self._spec = spec
        self._struct = struct.Struct("=" + "".join(_FORMATS[c] for c in spec.argtypes))
        n_args = len(spec.argtypes)
        self._values = (ctypes.c_char * max(1, n_args * _BYTES))()
        base = ctypes.addressof(self._values)
        self._pointers = (ctypes.c_void_p * max(1, n_args))(
            *(base + i * _BYTES for i in range(n_args))
        )
        self.pointers = ctypes.addressof(self._pointers)

    def fill(self, args: Sequence[int | float]) -> None:
        """Lay out the arguments of the next launch.

        Raises
        ------
        ValueError
            If there are too few or too many, or one does not fit its parameter.
        """
        try:
            self._struct.pack_into(self._values, 0, *args)
        except (struct.error, OverflowError, TypeError) as exc:
            raise ValueError(
                f"kernel {self._spec.name}: arguments {tuple(args)} do not fit the "
                f"parameters {self._spec.argtypes}: {exc}"
            ) from exc
