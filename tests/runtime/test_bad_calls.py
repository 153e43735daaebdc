"""Calls that do not fit: the message says what and where, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hps_numba.errors import (
    UnknownTableError,
)
from hps_numba.runtime.hps import HPS
from tests.oracle import versions_in
from tests.runtime.deployments import Table, model, server_config

ITEMS = Table("items", dim=4, n_rows=200, version=1)
USERS = Table("users", dim=8, n_rows=50, version=2)
TAG = "hps_et.wdl.items"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HPS]:
    """Return a server that no test of this module may change."""
    root = tmp_path_factory.mktemp("server")
    params = model(root, [ITEMS, USERS], max_batchsize=30)  # at most 300 keys
    with HPS(server_config(root, [params])) as made:
        yield made
        assert_unchanged(made)


def assert_unchanged(server: HPS) -> None:
    for table in (ITEMS, USERS):
        rows = server.lookup(table.keys, "wdl", table.name)
        assert np.array_equal(rows, table.rows)
        assert server.lookup([table.n_rows], "wdl", table.name)[0, 0] == table.default


class TestShapesOfCalls:
    def test_keys_go_into_the_mapping(self, server: HPS) -> None:
        with pytest.raises(TypeError, match="keys go into the mapping"):
            server.session("wdl").lookup({"items": [1]}, [5])  # type: ignore[call-overload]

    def test_out_of_several_tables_is_a_mapping(self, server: HPS) -> None:
        out = np.empty((1, 4), np.float32)
        with pytest.raises(TypeError, match="are mappings; got ndarray"):
            server.session("wdl").lookup({"items": [1]}, out=out)  # type: ignore[call-overload]

    @pytest.mark.parametrize("table", [None, 0.0, [0]])
    def test_a_table_is_a_name_or_a_position(self, server: HPS, table: Any) -> None:
        with pytest.raises(UnknownTableError, match="it has 0: items, 1: users"):
            server.lookup([1], "wdl", table)

    def test_masked_keys_are_refused(self, server: HPS) -> None:
        keys = np.ma.masked_array([1, 2], mask=[False, True])
        with pytest.raises(TypeError, match=f"{TAG}: masked keys"):
            server.lookup(keys, "wdl")

    def test_ragged_rows_are_refused(self, server: HPS) -> None:
        with pytest.raises(ValueError, match=f"{TAG}: rows are no matrix"):
            server.update("wdl", 0, [1, 2], [[1.0], [1.0, 2.0]])


class TestNames:
    @pytest.mark.parametrize(
        "call",
        [
            lambda s: s.lookup([1], "nobody", 0),
            lambda s: s.session("nobody"),
            lambda s: s.update("nobody", 0, [1], ITEMS.rows[:1]),
            lambda s: s.delete("nobody", 0, [1]),
            lambda s: s.refresh("nobody"),
            lambda s: s.reload("nobody"),
            lambda s: s.remove_model("nobody"),
            lambda s: s.locate("nobody", 0, [1]),
        ],
    )
    def test_an_unknown_model_is_told_with_those_there_are(
        self, server: HPS, call: Callable[[HPS], object]
    ) -> None:
        with pytest.raises(UnknownTableError, match=r"'nobody' .* served are wdl"):
            call(server)

    @pytest.mark.parametrize("table", ["nothing", 2, -1, 1 << 40])
    @pytest.mark.parametrize(
        "call",
        [
            lambda s, t: s.lookup([1], "wdl", t),
            lambda s, t: s.session("wdl").lookup(t, [1]),
            lambda s, t: s.update("wdl", t, [1], ITEMS.rows[:1]),
            lambda s, t: s.delete("wdl", t, [1]),
            lambda s, t: s.refresh("wdl", t),
            lambda s, t: s.locate("wdl", t, [1]),
        ],
    )
    def test_an_unknown_table_is_told_with_those_there_are(
        self, server: HPS, table: Any, call: Callable[[HPS, Any], object]
    ) -> None:
        with pytest.raises(UnknownTableError, match="'wdl' has no table") as caught:
            call(server, table)
        assert repr(table) in str(caught.value)
        assert "0: items, 1: users" in str(caught.value)

    def test_an_unknown_table_among_several_is_told(self, server: HPS) -> None:
        with pytest.raises(UnknownTableError, match="'nothing'"):
            server.session("wdl").lookup({"items": [1], "nothing": [2]})

    @pytest.mark.parametrize("device", [1, -1])
    def test_a_device_without_the_model_is_told(self, server: HPS, device: int) -> None:
        for call in (
            lambda: server.lookup([1], "wdl", 0, device),
            lambda: server.session("wdl", device),
        ):
            with pytest.raises(UnknownTableError, match=r"'wdl'.*device.*\[0\]"):
                call()


class TestKeys:
    @pytest.mark.parametrize(
        "keys",
        [
            pytest.param(np.array([1.0, 2.0]), id="float64"),
            pytest.param(np.array([1, 2], np.float16), id="float16"),
            pytest.param([1.5], id="list of floats"),
            pytest.param(np.array([1, 2], object), id="object"),
            pytest.param([1, None], id="None in a list"),
            pytest.param([1 << 70], id="beyond 64 bits"),
            pytest.param([True, False], id="bool"),
            pytest.param(["1"], id="text"),
            pytest.param(b"12345678", id="bytes"),
            pytest.param([1 + 2j], id="complex"),
            pytest.param(np.array(["2020-01-01"], "datetime64[D]"), id="dates"),
            pytest.param(np.empty(0, np.float32), id="no floats"),
            pytest.param({1, 2}, id="set"),
        ],
    )
    def test_what_is_no_integer_is_refused(self, server: HPS, keys: Any) -> None:
        for call in (
            lambda: server.lookup(keys, "wdl", "items"),
            lambda: server.session("wdl").lookup({"users": [1], "items": keys}),
            lambda: server.update("wdl", "items", keys, ITEMS.rows[:2]),
            lambda: server.delete("wdl", "items", keys),
            lambda: server.locate("wdl", "items", keys),
        ):
            with pytest.raises(TypeError, match=TAG):
                call()

    def test_a_ragged_list_is_refused(self, server: HPS) -> None:
        with pytest.raises(ValueError, match="inhomogeneous"):
            server.lookup([[1, 2], [3]], "wdl", "items")  # type: ignore[list-item]

    def test_a_missing_list_of_keys_is_told(self, server: HPS) -> None:
        with pytest.raises(TypeError, match="keys are missing"):
            server.session("wdl").lookup("items")  # type: ignore[call-overload]

    def test_too_many_keys_are_refused_with_the_limit(self, server: HPS) -> None:
        for shape in [(301,), (7, 43)]:
            keys = np.zeros(shape, np.int64)
            with pytest.raises(ValueError, match=f"{TAG}.*301 keys.* 300 ") as caught:
                server.lookup(keys, "wdl", "items")
            assert "max_batch_size" in str(caught.value)
        assert_unchanged(server)

    def test_the_limit_itself_is_allowed(self, server: HPS) -> None:
        keys = np.arange(300) % 200
        assert (versions_in(keys, server.lookup(keys, "wdl", "items")) == 1).all()

    def test_keys_of_a_write_have_one_dimension(self, server: HPS) -> None:
        keys = np.zeros((2, 2), np.int64)
        with pytest.raises(ValueError, match=rf"{TAG}.*\(2, 2\)"):
            server.update("wdl", "items", keys, np.zeros((2, 2, 4), np.float32))
        with pytest.raises(ValueError, match=rf"{TAG}.*\(2, 2\)"):
            server.delete("wdl", "items", keys)


class TestOutput:
    KEYS = (1, 2, 3)

    @pytest.mark.parametrize(
        "out",
        [
            pytest.param(np.zeros((3, 4), np.float64), id="float64"),
            pytest.param(np.zeros((3, 4), np.float16), id="float16"),
            pytest.param(np.zeros((3, 4), np.int32), id="int32"),
            pytest.param(np.zeros((3, 4), ">f4"), id="big-endian"),
            pytest.param([[0.0] * 4] * 3, id="list"),
            pytest.param(bytearray(48), id="bytearray"),
        ],
    )
    def test_an_out_of_another_type_is_refused(self, server: HPS, out: Any) -> None:
        before = np.array(out, copy=True) if isinstance(out, np.ndarray) else None
        with pytest.raises(TypeError, match=rf"{TAG}.*float32"):
            server.lookup(self.KEYS, "wdl", "items", out=out)
        assert before is None or np.array_equal(out, before)

    @pytest.mark.parametrize(
        "shape",
        [(3, 3), (3, 5), (2, 4), (4, 4), (12,), (1, 3, 4), (3, 4, 1), (0, 4), ()],
    )
    def test_an_out_of_another_shape_is_refused(
        self, server: HPS, shape: tuple[int, ...]
    ) -> None:
        out = np.full(shape, 7, np.float32)
        with pytest.raises(ValueError, match=rf"{TAG}.*need \(3, 4\)") as caught:
            server.lookup(self.KEYS, "wdl", "items", out=out)
        assert str(shape) in str(caught.value)
        assert (out == 7).all()

    @pytest.mark.parametrize(
        "make",
        [
            pytest.param(lambda: read_only(np.full((3, 4), 7, np.float32)), id="ro"),
            pytest.param(lambda: np.full((3, 8), 7, np.float32)[:, ::2], id="strided"),
            pytest.param(lambda: np.full((4, 3), 7, np.float32).T, id="transposed"),
            pytest.param(lambda: np.full((3, 4), 7, np.float32)[::-1], id="reversed"),
            pytest.param(
                lambda: np.broadcast_to(np.full(4, 7, np.float32), (3, 4)),
                id="repeated",
            ),
        ],
    )
    def test_an_out_that_cannot_be_filled_is_refused(
        self, server: HPS, make: Callable[[], Any]
    ) -> None:
        out = make()
        with pytest.raises(ValueError, match=f"{TAG}.*contiguous and writable"):
            server.lookup(self.KEYS, "wdl", "items", out=out)
        assert (out == 7).all()

    @pytest.mark.parametrize(
        ("found", "error"),
        [
            pytest.param(np.ones(3, np.uint8), TypeError, id="uint8"),
            pytest.param([True] * 3, TypeError, id="list"),
            pytest.param(np.ones(2, np.bool_), ValueError, id="short"),
            pytest.param(np.ones((3, 1), np.bool_), ValueError, id="column"),
            pytest.param(np.ones(6, np.bool_)[::2], ValueError, id="strided"),
        ],
    )
    def test_a_found_that_does_not_fit_is_refused(
        self, server: HPS, found: Any, error: type[Exception]
    ) -> None:
        out = np.full((3, 4), 7, np.float32)
        with pytest.raises(error, match=f"{TAG}.*found"):
            server.lookup(self.KEYS, "wdl", "items", out=out, found=found)
        assert np.all(found)
        assert (out == 7).all()

    def test_what_fits_is_not_written_if_another_table_does_not(
        self, server: HPS
    ) -> None:
        out = {
            "items": np.full((3, 4), 7, np.float32),
            "users": np.full((3, 4), 7, np.float32),  # the dim is 8
        }
        found = {"items": np.ones(3, np.bool_)}
        keys = {"items": self.KEYS, "users": self.KEYS}
        with pytest.raises(ValueError, match=r"hps_et\.wdl\.users.*\(3, 8\)"):
            server.session("wdl").lookup(keys, out=out, found=found)
        assert (out["items"] == 7).all()
        assert found["items"].all()

    def test_an_out_for_a_table_that_is_not_asked_for_is_refused(
        self, server: HPS
    ) -> None:
        for option in ("out", "found"):
            with pytest.raises(ValueError, match=r"'item'.*items"):
                server.session("wdl").lookup({"items": [1]}, **{option: {"item": None}})

    @settings(
        max_examples=150,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(
        keys=arrays.arrays(
            st.sampled_from([np.int64, np.int32, np.uint64, np.uint8, np.float32]),
            arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9),
        ),
        shape=arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9),
        fits=st.booleans(),
    )
    def test_nothing_is_written_beside_the_output(
        self, server: HPS, keys: Any, shape: tuple[int, ...], fits: bool
    ) -> None:
        shape = (*keys.shape, ITEMS.dim) if fits else shape
        size = int(np.prod(shape))
        guarded = np.full(size + 128, -7, np.float32)
        out = guarded[64 : 64 + size].reshape(shape)
        found = np.ones(keys.shape, np.bool_)
        if out.shape != (*keys.shape, ITEMS.dim) or keys.dtype.kind == "f":
            with pytest.raises((TypeError, ValueError), match=TAG):
                server.lookup(keys, "wdl", "items", out=out, found=found)
            assert (out == -7).all()
            assert found.all()
        else:
            server.lookup(keys, "wdl", "items", out=out, found=found)
            plain = keys.astype(np.int64)
            known = (plain >= 0) & (plain < ITEMS.n_rows)
            assert np.array_equal(found, known)
            assert (versions_in(plain[known], out[known]) == 1).all()
            assert (out[~known] == ITEMS.default).all()
        assert (guarded[:64] == -7).all()
        assert (guarded[64 + size :] == -7).all()


class TestRows:
    @pytest.mark.parametrize(
        "shape", [(2, 3), (2, 5), (1, 4), (3, 4), (8,), (2, 4, 1), (0, 4), (2, 0)]
    )
    def test_rows_of_another_shape_are_refused(
        self, server: HPS, shape: tuple[int, ...]
    ) -> None:
        rows = np.full(shape, 9, np.float32)
        with pytest.raises(ValueError, match=rf"{TAG}.*\(2, 4\)") as caught:
            server.update("wdl", "items", [1, 2], rows)
        assert str(shape) in str(caught.value)
        assert_unchanged(server)

    @pytest.mark.parametrize(
        "rows",
        [
            pytest.param([["a"] * 4] * 2, id="text"),
            pytest.param(np.zeros((2, 4), np.complex64), id="complex"),
            pytest.param(np.zeros((2, 4), np.bool_), id="bool"),
            pytest.param(np.full((2, 4), None), id="object"),
        ],
    )
    def test_rows_that_are_no_numbers_are_refused(self, server: HPS, rows: Any) -> None:
        with pytest.raises(TypeError, match=TAG):
            server.update("wdl", "items", [1, 2], rows)
        assert_unchanged(server)

    def test_counters_do_not_count_what_was_refused(self, server: HPS) -> None:
        before = server.stats().table("wdl", "items")
        with pytest.raises(ValueError, match=TAG):
            server.update("wdl", "items", [1, 2], np.zeros((2, 3)))
        after = server.stats().table("wdl", "items")
        assert (after.updated_rows, after.lookups) == (
            before.updated_rows,
            before.lookups,
        )


def read_only(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.flags.writeable = False
    return array
