"""Arrays on a device are read as their owners describe them, or refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hps_numba.kernels.cuda.cubins import CubinCache
from hps_numba.kernels.cuda.gpu import Block, Gpu
from hps_numba.kernels.cuda.interchange import n_devices
from hps_numba.runtime.gpu.arrays import (
    device_keys,
    device_output,
    is_on_device,
    view,
)
from hps_numba.types import RowDtype, TableSpec
from tests.runtime.gpu.foreign import (
    Both,
    Described,
    Exchanged,
    description,
    downloaded,
    uploaded,
)

on_device = pytest.mark.device
TABLE = TableSpec("m", "t", dim=4, max_keys=100)
HALF = TableSpec("m", "half", dim=4, dtype=RowDtype.FLOAT16)


@pytest.fixture(scope="module")
def other(gpu: Gpu) -> Gpu:
    if n_devices() == 1:
        pytest.skip("a machine with one device has no memory of another")
    return Gpu(1, cubins=CubinCache(None))


@pytest.fixture
def block(gpu: Gpu) -> Iterator[Block]:
    block = Block(gpu, 1024)
    yield block
    block.close()


class OnDevice:
    """An array in name only: what it says of its device is all there is."""

    def __init__(self, kind: int) -> None:
        self.kind = kind

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, 0


class HostTensor(OnDevice):
    """As torch has it: the interface's name, but nothing behind it on the host."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        raise AttributeError("a tensor on the host")


@pytest.mark.parametrize(
    "x", [np.arange(3), [1, 2], (1,), 7, None, np.int64(1), OnDevice(1), HostTensor(1)]
)
def test_what_the_host_has_is_not_on_a_device(x: Any) -> None:
    assert not is_on_device(x)


@pytest.mark.parametrize("x", [OnDevice(2), OnDevice(13), Described({})])
def test_what_says_so_is_on_a_device(x: Any) -> None:
    assert is_on_device(x)


def test_asking_takes_no_cuda_package() -> None:
    code = (
        "import sys, hps_numba.runtime.gpu.arrays, hps_numba.runtime.gpu.errors\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'cuda'])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert found.stdout.strip() == "[]"


@on_device
@pytest.mark.parametrize("version", [2, 3])
def test_an_interface_is_read_as_it_is(gpu: Gpu, block: Block, version: int) -> None:
    x = Described(description(block, (2, 3), "<i8") | {"version": version})
    found = view(x, gpu=gpu, stream=0, what="keys")
    assert (found.address, found.shape, found.size) == (block.address, (2, 3), 6)
    assert found.dtype == np.int64
    assert found.stream is None
    assert found.owner is x


@on_device
def test_strides_of_a_contiguous_array_may_be_given(gpu: Gpu, block: Block) -> None:
    for shape, strides in [
        ((2, 3), (24, 8)),
        ((1, 3), (999, 8)),  # one long: its stride is never taken
        ((4, 1), (8, 999)),
        ((0, 3), (1, 2)),
        ((), ()),
    ]:
        x = Described(description(block, shape, "<i8") | {"strides": strides})
        assert view(x, gpu=gpu, stream=0, what="keys").shape == shape


@on_device
@pytest.mark.parametrize("strides", [(8, 16), (48, 8), (-24, 8), (0, 8)])
def test_other_strides_are_refused(
    gpu: Gpu, block: Block, strides: tuple[int, int]
) -> None:
    x = Described(description(block, (2, 3), "<i8") | {"strides": strides})
    with pytest.raises(ValueError, match=r"keys must be contiguous; shape \(2, 3\)"):
        view(x, gpu=gpu, stream=0, what="keys")


@on_device
@pytest.mark.parametrize("typestr", ["|V8", "|O8", "<M8[s]", "nonsense"])
def test_what_is_no_number_is_refused(gpu: Gpu, block: Block, typestr: str) -> None:
    x = Described(description(block, (2,), typestr))
    with pytest.raises(TypeError, match="keys: "):
        view(x, gpu=gpu, stream=0, what="keys")


@on_device
def test_a_mask_is_refused(gpu: Gpu, block: Block) -> None:
    x = Described(description(block, (2,), "<i8") | {"mask": object()})
    with pytest.raises(TypeError, match="keys: masked arrays"):
        view(x, gpu=gpu, stream=0, what="keys")


@on_device
def test_stream_0_names_no_stream(gpu: Gpu, block: Block) -> None:
    x = Described(description(block, (2,), "<i8") | {"stream": 0})
    with pytest.raises(ValueError, match="keys: its stream is 0"):
        view(x, gpu=gpu, stream=0, what="keys")


@on_device
def test_read_only_memory_is_read_but_not_written(gpu: Gpu, block: Block) -> None:
    x = Described(description(block, (2,), "<i8") | {"data": (block.address, True)})
    assert view(x, gpu=gpu, stream=0, what="keys").address == block.address
    with pytest.raises(ValueError, match="keys cannot be written"):
        view(x, gpu=gpu, stream=0, what="keys", writable=True)


@on_device
def test_memory_of_another_device_is_refused(gpu: Gpu, other: Gpu) -> None:
    array = uploaded(other, [1, 2])
    for x in (array, Exchanged(array)):
        with pytest.raises(ValueError, match="on device 1, the cache on 0"):
            view(x, gpu=gpu, stream=0, what="keys")
        assert view(x, gpu=other, stream=0, what="keys").address == array.address


@on_device
@pytest.mark.usefixtures("other")
def test_ordinary_memory_is_refused(gpu: Gpu) -> None:
    host = np.arange(4)
    x = Described(
        {"shape": (4,), "typestr": "<i8", "data": (host.ctypes.data, False)}
        | {"strides": None, "version": 3}
    )
    with pytest.raises(ValueError, match="is in no memory of a device"):
        view(x, gpu=gpu, stream=0, what="keys")


@on_device
@pytest.mark.parametrize("kind", [1, 3, 13])
def test_other_kinds_of_memory_are_refused(gpu: Gpu, kind: int) -> None:
    x = Exchanged(uploaded(gpu, [1]), device=(kind, 0))
    with pytest.raises(TypeError, match=f"keys: .* got kind {kind}"):
        view(x, gpu=gpu, stream=0, what="keys")
    assert not x.streams


@on_device
def test_what_is_no_array_is_refused(gpu: Gpu) -> None:
    with pytest.raises(TypeError, match=r"keys: an array with .*; got object"):
        view(object(), gpu=gpu, stream=0, what="keys")


@on_device
@pytest.mark.parametrize(("stream_given", "named"), [(0, 1), (1, 1), (2, 2)])
def test_dlpack_is_told_the_stream_that_reads(
    gpu: Gpu, stream_given: int, named: int
) -> None:
    array = uploaded(gpu, np.arange(6).reshape(2, 3))
    x = Exchanged(array)
    found = view(x, gpu=gpu, stream=stream_given, what="keys")
    assert x.streams == [named]
    assert (found.address, found.shape) == (array.address, (2, 3))
    assert (found.dtype, found.stream) == (np.int64, None)


@on_device
def test_what_dlpack_refuses_is_a_type_error(gpu: Gpu) -> None:
    class Refusing(OnDevice):
        def __dlpack__(self, **options: Any) -> Any:
            raise BufferError("not this one")

    with pytest.raises(TypeError, match="keys: not this one"):
        view(Refusing(2), gpu=gpu, stream=0, what="keys")


@on_device
def test_an_array_that_names_no_stream_is_asked_by_dlpack(gpu: Gpu) -> None:
    x = Both(uploaded(gpu, [1, 2]))
    for _ in range(2):
        found = view(x, gpu=gpu, stream=0, what="keys")
        assert found.address == x.array.address
    assert x.streams == [1, 1]


@on_device
def test_what_has_no_description_is_asked_by_dlpack(gpu: Gpu) -> None:
    class Undescribed(Exchanged):
        @property
        def __cuda_array_interface__(self) -> dict[str, Any]:
            raise KeyError("bfloat16")

    x = Undescribed(uploaded(gpu, [1.0]))
    assert view(x, gpu=gpu, stream=0, what="keys").address == x.array.address
    with pytest.raises(TypeError, match=r"hps_et\.m\.t: keys on a device are int64"):
        device_keys(x, TABLE, stream=0, gpu=gpu)


@on_device
def test_a_tensor_that_wants_gradients_is_read_but_not_written(gpu: Gpu) -> None:
    class Wanting(Exchanged):
        requires_grad = True

        @property
        def __cuda_array_interface__(self) -> dict[str, Any]:
            raise RuntimeError("use detach()")

    x = Wanting(uploaded(gpu, [1.0]))
    assert view(x, gpu=gpu, stream=0, what="out").address == x.array.address
    with pytest.raises(ValueError, match=r"out wants gradients: pass out.detach()"):
        view(x, gpu=gpu, stream=0, what="out", writable=True)


@on_device
def test_a_view_keeps_the_memory_alive(gpu: Gpu) -> None:
    want = np.arange(1000)
    found = view(Exchanged(uploaded(gpu, want)), gpu=gpu, stream=0, what="keys")
    uploaded(gpu, np.zeros(1000))
    got = downloaded(gpu, found.address, found.shape, found.dtype)
    assert np.array_equal(got, want)


@on_device
@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_keys_are_64_bits_wide(gpu: Gpu, dtype: Any) -> None:
    array = uploaded(gpu, np.arange(6, dtype=dtype).reshape(3, 2))
    found = device_keys(array, TABLE, stream=0, gpu=gpu)
    assert (found.address, found.shape) == (array.address, (3, 2))


@on_device
@pytest.mark.parametrize("dtype", [np.int32, np.float64, np.bool_, ">i8"])
def test_other_keys_are_refused(gpu: Gpu, dtype: Any) -> None:
    array = uploaded(gpu, np.zeros(5, dtype))
    with pytest.raises(TypeError, match=r"hps_et\.m\.t: keys on a device are int64"):
        device_keys(array, TABLE, stream=0, gpu=gpu)


@on_device
def test_keys_are_counted(gpu: Gpu) -> None:
    device_keys(uploaded(gpu, np.zeros((10, 10), int)), TABLE, stream=0, gpu=gpu)
    with pytest.raises(ValueError, match="101 keys exceeds the limit of 100"):
        device_keys(uploaded(gpu, np.zeros(101, int)), TABLE, stream=0, gpu=gpu)


@on_device
def test_keys_begin_at_a_multiple_of_their_size(gpu: Gpu, block: Block) -> None:
    described = description(block, (2,), "<i8") | {"data": (block.address + 4, False)}
    with pytest.raises(ValueError, match=r"keys begin at .* no multiple of their 8"):
        device_keys(Described(described), TABLE, stream=0, gpu=gpu)


@on_device
def test_no_keys_need_no_memory(gpu: Gpu, block: Block) -> None:
    for address in (0, None):
        described = description(block, (0,), "<i8") | {"data": (address, False)}
        found = device_keys(Described(described), TABLE, stream=0, gpu=gpu)
        assert (found.address, found.size) == (0, 0)


@on_device
def test_an_output_has_the_shape_of_the_rows(gpu: Gpu) -> None:
    array = uploaded(gpu, np.zeros((3, 2, 4), np.float32))
    found = device_output(array, (3, 2), TABLE, stream=0, gpu=gpu)
    assert found.address == array.address
    for shape in ((3,), (2, 3), (6,)):
        with pytest.raises(ValueError, match=r"out has shape \(3, 2, 4\); these keys"):
            device_output(array, shape, TABLE, stream=0, gpu=gpu)


@on_device
def test_an_output_has_the_dtype_of_the_rows_or_float32(gpu: Gpu) -> None:
    single = uploaded(gpu, np.zeros((3, 4), np.float32))
    half = uploaded(gpu, np.zeros((3, 4), np.float16))
    for spec, array in ((TABLE, single), (HALF, single), (HALF, half)):
        found = device_output(array, (3,), spec, stream=0, gpu=gpu)
        assert found.dtype == array.dtype
    with pytest.raises(TypeError, match="out is an array of float32; got float16"):
        device_output(half, (3,), TABLE, stream=0, gpu=gpu)
    whole = uploaded(gpu, np.zeros((3, 4), int))
    with pytest.raises(TypeError, match="of float32 or float16; got int64"):
        device_output(whole, (3,), HALF, stream=0, gpu=gpu)


@on_device
def test_an_output_is_on_the_device(gpu: Gpu) -> None:
    out = np.zeros((3, 4), np.float32)
    with pytest.raises(TypeError, match=r"out is an array on device 0, .* got ndarray"):
        device_output(out, (3,), TABLE, stream=0, gpu=gpu)


@on_device
def test_an_output_can_be_written(gpu: Gpu, block: Block) -> None:
    described = description(block, (3, 4), "<f4") | {"data": (block.address, True)}
    with pytest.raises(ValueError, match="out cannot be written"):
        device_output(Described(described), (3,), TABLE, stream=0, gpu=gpu)
