from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hps_numba.demo import DemoOptions
from hps_numba.demo.workload import build_workload
from hps_numba.errors import ConfigError, HPSError


def trace_workload(path, **options):
    return build_workload(DemoOptions(trace=path, **options))


def asked_keys(workload):
    """Return the keys of all requests, one after the other."""
    table = workload.tables[0]
    parts = [
        table.ids[workload.request(number)[table.name]].reshape(-1)
        for number in range(workload.n_requests)
    ]
    return np.concatenate(parts).tolist()


def test_the_flights_have_the_wide_and_deep_shape():
    workload = build_workload(DemoOptions(batch=1024))
    wide, deep = workload.tables
    assert (workload.model, workload.n_samples, workload.n_requests) == (
        "wdl",
        327_346,
        320,
    )
    assert (wide.name, wide.dim, len(wide.ids)) == ("wide", 1, 2751)
    assert (deep.name, deep.dim, len(deep.ids)) == ("deep", 16, 108_284)
    request = workload.request(0)
    assert request["wide"].shape == (1024, 2)
    assert request["deep"].shape == (1024, 26)
    assert workload.request(319)["deep"].shape == (327_346 - 319 * 1024, 26)


def test_ids_that_first_appear_after_the_cut_off_are_not_trained():
    workload = build_workload(DemoOptions(batch=1000, requests=20))
    assert workload.n_requests == 20
    assert workload.cut_off == 18_000
    for table in workload.tables:
        trained = set(np.flatnonzero(table.trained).tolist())
        assert trained == set(table.positions[:18_000].reshape(-1).tolist())
    late = np.unique(workload.tables[1].positions[18_000:])
    assert not workload.tables[1].trained[late].all()


def test_the_bytes_of_a_model_are_those_of_its_trained_rows():
    workload = build_workload(DemoOptions(batch=100, requests=3))
    wide, deep = workload.tables
    assert deep.model_bytes == int(deep.trained.sum()) * 64
    assert workload.model_bytes == wide.model_bytes + deep.model_bytes


KEYS = np.array([5, -1, 1 << 62, 5, np.iinfo(np.int64).min, 0, 7], np.int64)


def write_raw(path: Path) -> Path:
    KEYS.astype("<i8").tofile(path)
    return path


def write_npy(path: Path) -> Path:
    np.save(path.with_suffix(".npy"), KEYS.reshape(1, -1))
    return path.with_suffix(".npy")


@pytest.mark.parametrize("write", [write_raw, write_npy])
def test_a_trace_is_replayed_in_its_order(tmp_path, write):
    workload = trace_workload(write(tmp_path / "trace"), batch=3)
    assert workload.n_requests == 3
    assert asked_keys(workload) == KEYS.tolist()


def test_narrow_integers_of_a_numpy_file_are_keys(tmp_path):
    np.save(tmp_path / "t.npy", np.array([3, 1, 3], np.uint32))
    assert asked_keys(trace_workload(tmp_path / "t.npy")) == [3, 1, 3]


def test_the_request_limit_cuts_a_trace(tmp_path):
    workload = trace_workload(write_raw(tmp_path / "t"), batch=2, requests=2)
    assert asked_keys(workload) == KEYS[:4].tolist()


def test_a_trace_of_one_key_is_one_trained_request(tmp_path):
    np.array([9]).tofile(tmp_path / "t")
    workload = trace_workload(tmp_path / "t")
    assert workload.n_requests == 1
    assert workload.tables[0].trained.tolist() == [True]


def bad_traces(folder: Path):
    (folder / "odd").write_bytes(b"\0" * 15)
    (folder / "empty").write_bytes(b"")
    (folder / "broken.npy").write_bytes(b"\x93NUMPY broken")
    np.save(folder / "float.npy", np.zeros(3))
    np.save(folder / "wide.npy", np.zeros(3, np.uint64))
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("odd", "15 bytes are no multiple of 8"),
        ("empty", "holds no keys"),
        ("broken.npy", "cannot be read"),
        ("float.npy", "dtype is float64"),
        ("wide.npy", "dtype is uint64"),
        ("absent", "No such file"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_by_name(tmp_path, name, message):
    path = bad_traces(tmp_path) / name
    with pytest.raises(HPSError, match=message) as error:
        trace_workload(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"requests": 0},
        {"batch": 0},
        {"update_share": -0.1},
        {"update_share": 1.5},
        {"host_share": 0},
    ],
)
def test_an_option_out_of_range_is_refused_by_name(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        DemoOptions(**options)
