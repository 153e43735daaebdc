"""Rows that a step touched: of NumPy arrays, and of tensors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from hps_numba.runtime.updates.steps import touched_rows


class Tensor:
    """What of a PyTorch tensor the package uses, and its refusals."""

    is_sparse = False

    def __init__(
        self, array: object, *, has_history: bool = False, is_bfloat16: bool = False
    ) -> None:
        self._array = np.asarray(array)
        self._has_history = has_history
        self._is_bfloat16 = is_bfloat16
        self.shape = self._array.shape
        self.grad: Tensor | SparseTensor | None = None
        self.on_host = False

    def _like(self, array: np.ndarray) -> Tensor:
        return Tensor(array, is_bfloat16=self._is_bfloat16)

    def detach(self) -> Tensor:
        return self._like(self._array)

    def cpu(self) -> Tensor:
        copy = self._like(self._array)
        copy.on_host = True
        return copy

    def float(self) -> Tensor:
        assert self.on_host
        copy = Tensor(self._array.astype(np.float32))
        copy.on_host = True
        return copy

    def __getitem__(self, numbers: np.ndarray) -> Tensor:
        assert not self._has_history
        return self._like(self._array[numbers])

    def numpy(self) -> np.ndarray:
        if self._has_history:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
        if not self.on_host:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if self._is_bfloat16:
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self._array


class SparseTensor:
    """A sparse gradient, which may have a row several times."""

    is_sparse = True

    def __init__(self, numbers: list[int], shape: tuple[int, int]) -> None:
        self._numbers = numbers
        self._is_coalesced = False
        self.shape = shape

    def detach(self) -> SparseTensor:
        return SparseTensor(self._numbers, self.shape)

    def coalesce(self) -> SparseTensor:
        copy = SparseTensor(sorted(set(self._numbers)), self.shape)
        copy._is_coalesced = True
        return copy

    def indices(self) -> list[Tensor]:
        assert self._is_coalesced
        return [Tensor(self._numbers)]


class Embedding:
    def __init__(self, weight: Tensor) -> None:
        self.weight = weight


def duck_embedding(weights: np.ndarray) -> Any:
    return Embedding(Tensor(weights, has_history=True))


def duck_gradient(numbers: list[int], shape: tuple[int, int]) -> Any:
    return SparseTensor(numbers, shape)


def torch_embedding(weights: np.ndarray) -> Any:
    torch: Any = __import__("torch")
    return torch.nn.Embedding.from_pretrained(torch.tensor(weights), freeze=False)


def torch_gradient(numbers: list[int], shape: tuple[int, int]) -> Any:
    torch: Any = __import__("torch")
    values = torch.ones(len(numbers), shape[1])
    return torch.sparse_coo_tensor([numbers], values, shape)


# The duck always; PyTorch itself where it is installed, which no test asks for.
TENSORS = [(duck_embedding, Tensor, duck_gradient)] + (
    [(torch_embedding, lambda a: __import__("torch").tensor(a), torch_gradient)]
    if find_spec("torch")
    else []
)
with_tensors = pytest.mark.parametrize(("embedding", "tensor", "gradient"), TENSORS)
Make = Callable[..., Any]
WEIGHTS = np.arange(20, dtype=np.float32).reshape(5, 4)


def test_looked_up_rows_come_once_with_their_weights_of_now() -> None:
    step = touched_rows(WEIGHTS, np.array([[3, 1], [1, 3], [4, 1]]))
    assert step.keys.tolist() == [1, 3, 4]
    assert step.rows.tolist() == WEIGHTS[[1, 3, 4]].tolist()
    assert not np.shares_memory(step.rows, WEIGHTS)
    assert len(touched_rows(WEIGHTS, [])) == 0


def test_row_numbers_become_keys_where_these_are_given() -> None:
    keys = np.array([100, -5, 7, 2**62, 9])
    step = touched_rows(WEIGHTS, [3, 1, 1], keys=keys)
    assert step.keys.tolist() == [-5, 2**62]
    assert step.rows.tolist() == WEIGHTS[[1, 3]].tolist()


@with_tensors
def test_an_embedding_gives_the_rows_of_index_tensors(
    embedding: Make, tensor: Make, gradient: Make
) -> None:
    step = touched_rows(embedding(WEIGHTS), tensor([[4, 0], [0, 4]]))
    assert type(step.rows) is np.ndarray
    assert step.keys.tolist() == [0, 4]
    assert step.rows.tolist() == WEIGHTS[[0, 4]].tolist()


@with_tensors
def test_a_sparse_gradient_names_the_rows(
    embedding: Make, tensor: Make, gradient: Make
) -> None:
    module = embedding(WEIGHTS)
    module.weight.grad = gradient([2, 0, 2], (5, 4))
    for step in (
        touched_rows(module),
        touched_rows(module.weight, gradient([0, 2, 0], (5, 4))),
    ):
        assert step.keys.tolist() == [0, 2]
        assert step.rows.tolist() == WEIGHTS[[0, 2]].tolist()


@with_tensors
def test_a_dense_gradient_names_the_rows_that_are_not_zero(
    embedding: Make, tensor: Make, gradient: Make
) -> None:
    dense = np.zeros((5, 4), np.float32)
    dense[1, 3] = -1e-20
    dense[4] = 2
    module = embedding(WEIGHTS)
    module.weight.grad = tensor(dense)
    assert touched_rows(module).keys.tolist() == [1, 4]
    assert touched_rows(WEIGHTS, dense).keys.tolist() == [1, 4]


def test_row_numbers_of_the_shape_of_the_weights_are_no_gradient() -> None:
    assert touched_rows(np.eye(2), np.array([[1, 0], [0, 0]])).keys.tolist() == [0, 1]


def test_values_that_numpy_lacks_come_as_float32() -> None:
    step = touched_rows(Tensor(WEIGHTS, is_bfloat16=True), [2])
    assert step.rows.dtype == np.float32
    assert step.rows.tolist() == [WEIGHTS[2].tolist()]


@pytest.mark.parametrize("numbers", [[-1], [5], [0, 99]])
def test_row_numbers_out_of_range_are_refused(numbers: list[int]) -> None:
    with pytest.raises(ValueError, match="row numbers are 0 to 4; got"):
        touched_rows(WEIGHTS, numbers)


def test_what_cannot_be_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="no gradient"):
        touched_rows(WEIGHTS)
    with pytest.raises(ValueError, match=r"weights are \(n, dim\); got shape \(5,\)"):
        touched_rows(WEIGHTS[:, 0], [1])
    with pytest.raises(ValueError, match=r"5 rows have keys \(5,\); got \(4,\)"):
        touched_rows(WEIGHTS, [1], keys=np.arange(4))
    with pytest.raises(TypeError, match="integers; got dtype float64"):
        touched_rows(WEIGHTS, [1.0])
    with pytest.raises(TypeError, match="integers; got dtype bool"):
        touched_rows(WEIGHTS, [True, False])


def test_torch_is_not_imported_for_arrays() -> None:
    code = (
        "import sys, numpy as np\n"
        "from hps_numba.runtime.updates.steps import touched_rows\n"
        "touched_rows(np.eye(3), [1])\n"
        "assert not {'torch', 'confluent_kafka'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
