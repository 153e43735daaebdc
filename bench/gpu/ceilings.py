"""What the device's memory gives at best: a copy, and random sectors."""

from __future__ import annotations

import numpy as np
from cuda.bindings import driver

from bench.gpu.device import Device, Scratch
from bench.gpu.kernels import (
    BLOCK,
    SECTOR_BYTES,
    SECTORS_A_THREAD,
    fill_kernel,
    row_words,
    sector_of,
    sectors_kernel,
)
from bench.gpu.timing import Work
from hps_numba.kernels.cuda.launch import checked
from hps_numba.kernels.cuda.layout import RowLayout


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


def sectors(device: Device, scratch: Scratch, n_bytes: int, n_launches: int) -> Work:
    """Return reads of random sectors of new memory; ``n_bytes`` is a power of two."""
    n_sectors = n_bytes // SECTOR_BYTES
    n_threads = max(BLOCK, min(1 << 22, n_sectors // SECTORS_A_THREAD))
    n_threads -= n_threads % BLOCK
    n_items = n_threads * SECTORS_A_THREAD
    memory, out = scratch.block(n_bytes), scratch.block(4 * n_threads)
    launch = device.gpu.launcher.launch
    # A row of so many bytes is a sector.
    rows = RowLayout(SECTOR_BYTES // 4)
    grid = -(-n_sectors * (SECTOR_BYTES // 4) // BLOCK), 1
    launch(fill_kernel(rows), grid, (memory, 0, n_sectors), device.stream)

    def call(i: int) -> None:
        args = (memory, n_sectors - 1, i * n_items, out)
        launch(sectors_kernel(), (n_threads // BLOCK, 1), args, device.stream)

    def check() -> None:
        # Of the last launch, by its last threads.
        n = min(n_threads, BLOCK)
        got = device.read(out + 4 * (n_threads - n), n, np.uint32)
        first = n_launches * n_items - n * SECTORS_A_THREAD
        drawn = sector_of(first + np.arange(n * SECTORS_A_THREAD))
        words = row_words(rows, drawn & np.uint64(n_sectors - 1))[:, 0]
        wanted = np.bitwise_xor.reduce(words.reshape(n, SECTORS_A_THREAD), axis=1)
        assert (got == wanted).all(), "other sectors were read"

    written = ((out, 4 * n_threads),)
    return Work("random sectors", call, n_launches, n_items, check, written)
