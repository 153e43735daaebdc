"""What the device's memory gives at best: a copy, and random sectors."""

from __future__ import annotations

from cuda.bindings import driver

from bench.gpu.device import Device, Scratch
from bench.gpu.kernels import BLOCK, SECTOR_BYTES, SECTORS_A_THREAD, sectors_kernel
from bench.gpu.timing import Work
from hps_numba.kernels.cuda.launch import checked


def copy(device: Device, scratch: Scratch, n_bytes: int) -> Work:
    """Return a copy inside the device; its items are bytes read and bytes written."""
    source, target = scratch.block(n_bytes), scratch.block(n_bytes)
    device.poison(source, n_bytes)
    device.gpu.zero(target, n_bytes, device.stream)
    call_of = driver.cuMemcpyDtoDAsync

    def call(i: int) -> None:
        args = (target, source, n_bytes, device.stream)
        checked(device.gpu.launcher.on(device.stream, call_of, *args), "copy")

    def check() -> None:
        end = device.read(target + n_bytes - 64, 64, "uint8")
        assert (end == device.read(source, 64, "uint8")).all(), "not copied"

    return Work("copy", call, 1, 2 * n_bytes, check)


def sectors(device: Device, memory: int, n_bytes: int, n_launches: int) -> Work:
    """Return reads of random sectors among the first ``n_bytes`` of some memory.

    ``n_bytes`` is a power of two. Nothing comes out of it that could be looked at.
    """
    n_threads = max(BLOCK, min(1 << 22, n_bytes // SECTOR_BYTES // SECTORS_A_THREAD))
    spec, grid = sectors_kernel(), (n_threads // BLOCK, 1)
    n_items = grid[0] * BLOCK * SECTORS_A_THREAD

    def call(i: int) -> None:
        args = (memory, n_bytes // SECTOR_BYTES - 1, i * n_items)
        device.gpu.launcher.launch(spec, grid, args, device.stream)

    return Work("random sectors", call, n_launches, n_items, lambda: None)
