from __future__ import annotations

import json

import numpy as np
import pytest

from hps_numba.demo.deployment import output_directory, write_deployment
from hps_numba.demo.values import known_rows
from hps_numba.demo.workload import Workload
from hps_numba.errors import HPSError
from hps_numba.tiers.model_files import open_model_directory


@pytest.fixture
def workload(table):
    return Workload("a title", "wdl", (table,), batch=2, cut_off=4)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_model_directories_hold_the_first_version_of_trained_ids(tmp_path, workload):
    write_deployment(workload, tmp_path, host_share=0.5)
    directory = open_model_directory(tmp_path / "model" / "deep", 4)
    assert directory.keys.tolist() == list(range(100, 108))
    expected = known_rows(4, np.arange(100, 108), 1, dim=4, default=-1.0)
    assert (directory.rows == expected).all()


def test_the_configuration_describes_the_tables(tmp_path, workload):
    deployed = write_deployment(workload, tmp_path, host_share=0.5)
    config = json.loads(deployed.config.read_text())
    assert config["persistent_db"]["path"] == str(tmp_path / "rocksdb")
    assert config["volatile_db"]["max_bytes"] == deployed.host_bytes
    (model,) = config["models"]
    assert model["model"] == "wdl"
    assert model["sparse_files"] == [str(tmp_path / "model" / "deep")]
    assert model["embedding_vecsize_per_table"] == [4]
    assert model["maxnum_catfeature_query_per_table_per_sample"] == [2]
    assert model["default_value_for_each_table"] == [-1.0]
    assert model["max_batch_size"] == 2
    assert model["gpucache"] is False


def test_a_gpu_gets_a_cache_whose_lookups_wait_for_all_rows(tmp_path, workload):
    deployed = write_deployment(workload, tmp_path, host_share=0.5, gpu="some GPU")
    (model,) = json.loads(deployed.config.read_text())["models"]
    assert deployed.gpu == "some GPU"
    assert (model["gpucache"], model["require_gpu"]) == (True, True)
    assert model["hit_rate_threshold"] > 1
    assert model["num_of_worker_buffer_in_pool"] == 2


def test_a_new_directory_is_made(tmp_path):
    with output_directory(tmp_path / "a" / "b") as output:
        assert output == tmp_path / "a" / "b"
        assert output.is_dir()


def test_only_what_an_earlier_demo_wrote_is_removed(tmp_path, workload):
    with output_directory(tmp_path) as output:
        write_deployment(workload, output, host_share=0.5)
        (output / "rocksdb").mkdir()
        (output / "rocksdb" / "CURRENT").write_text("")
    (tmp_path / "notes.txt").write_text("mine")
    with output_directory(tmp_path):
        assert names(tmp_path) == [".hps-numba-demo", "notes.txt"]


def test_a_link_is_removed_and_not_what_it_points_to(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("mine")
    with output_directory(tmp_path / "out") as output:
        (output / "rocksdb").symlink_to(kept)
    with output_directory(tmp_path / "out") as output:
        assert names(output) == [".hps-numba-demo"]
    assert names(kept) == ["file"]


def test_a_directory_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    with (
        pytest.raises(HPSError, match=r"was not written by the demo"),
        output_directory(tmp_path),
    ):
        pytest.fail("the directory was taken")
    assert names(tmp_path) == ["model"]


def test_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(HPSError, match=str(path)), output_directory(path):
        pytest.fail("the file was taken")
    assert path.read_text() == "mine"


def test_a_directory_serves_one_demo_at_a_time(tmp_path):
    with (
        output_directory(tmp_path / "out"),
        pytest.raises(HPSError, match="another demo is using it"),
        output_directory(tmp_path / "out"),
    ):
        pytest.fail("the directory was taken twice")
