"""Which GPU there is, for programs that choose their configuration by it."""

from __future__ import annotations


def device_name(ordinal: int = 0) -> str | None:
    """Return the name of a GPU that a cache can be on.

    Parameters
    ----------
    ordinal
        Number of the device.

    Returns
    -------
    str or None
        None without the packages, a driver or such a device.
    """
    try:
        from hps_numba.kernels.cuda.gpu import Gpu
        from hps_numba.kernels.cuda.launch import DeviceUnavailableError
    except ImportError:
        return None
    try:
        return str(Gpu(ordinal).launcher.device.name)
    except DeviceUnavailableError:
        return None
