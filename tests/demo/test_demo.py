"""The whole demo, on a few requests, with the real data, store and server."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest

from hps_numba.demo import DemoOptions, deployment, job, run
from hps_numba.demo.updater import ROUNDS
from hps_numba.demo.values import known_rows

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

on_the_host = partial(DemoOptions, gpu=False)


@pytest.fixture(scope="module")
def flights_run(tmp_path_factory):
    """Run twelve requests; return the exit code, the directory and the report."""
    output = tmp_path_factory.mktemp("demo") / "out"
    code = run(on_the_host(output=output, requests=12, batch=256, update_share=0.1))
    return code, output, json.loads((output / "report.json").read_text())


def test_a_run_without_a_wrong_row_ends_with_0(flights_run):
    code, _, report = flights_run
    assert code == 0
    assert report["wrong_rows"] == 0
    assert report["examples"] == []


def test_every_row_of_every_request_is_checked(flights_run):
    _, _, report = flights_run
    assert report["requests"] == 12
    assert report["keys"] == 12 * 256 * 28
    assert report["checks"]["in the replay"]["rows"] == report["keys"]


def test_every_id_is_checked_after_the_replay_and_after_a_restart(flights_run):
    _, _, report = flights_run
    n_ids = sum(table["ids"] for table in report["data"]["tables"])
    assert n_ids == 108_284 + 2751
    for occasion in ("after the replay", "after a restart"):
        assert report["checks"][occasion]["rows"] == n_ids


def test_updates_are_sent_and_seen(flights_run):
    _, _, report = flights_run
    updates = report["updates"]
    assert updates["rows"] == updates["distinct_rows"] * ROUNDS
    assert updates["distinct_rows"] > 0
    assert report["checks"]["right after their update"]["rows"] == updates["rows"]
    assert updates["staleness"]["p50_ms"] >= updates["acknowledged"]["p50_ms"] > 0


def test_keys_that_were_not_trained_get_default_rows(flights_run):
    _, _, report = flights_run
    assert 0 < report["defaults"] < report["keys"]
    assert report["checks"]["in the replay"]["defaults"] == report["defaults"]


def test_tiers_add_up(flights_run):
    _, _, report = flights_run
    host, rocksdb = report["tiers"]
    assert (host["tier"], rocksdb["tier"]) == ("host", "rocksdb")
    looked_up = report["keys"] + report["updates"]["rows"]
    assert host["asked"] == looked_up
    assert 0 < host["hits"] < host["asked"]
    assert 0 < rocksdb["hits"] <= rocksdb["asked"]
    assert host["bytes"] <= report["host_budget_bytes"]


def test_the_model_stays_usable(flights_run):
    from hps_numba import HPS

    _, output, report = flights_run
    with HPS.from_json(output / "ps.json") as server:
        assert server.lookup([[0, 1]], "wdl", "deep").shape == (1, 2, 16)
        rows = server.stats().table("wdl", "deep").tiers[-1].rows
    assert rows >= report["data"]["tables"][1]["trained_ids"]


def test_the_plot_is_a_picture(flights_run):
    _, output, _ = flights_run
    picture = (output / "demo.png").read_bytes()
    assert picture.startswith(PNG_SIGNATURE)
    width, height = np.frombuffer(picture[16:24], ">u4")
    assert width >= 1000
    assert height >= 600


def test_the_table_says_what_ran_and_what_was_found(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert run(on_the_host(output=tmp_path / "out", requests=2, batch=64)) == 0
    printed = capsys.readouterr().out
    for part in (
        "host memory + RocksDB, no GPU",
        "keys per second",
        "request p50 / p95 / p99 / max",
        "host memory hit rate",
        "RocksDB hit rate",
        "default rows",
        "updates applied",
        "staleness p50 / p95 / p99 / max",
        "wrong rows",
    ):
        assert part in printed


def test_a_second_run_in_the_same_directory_starts_afresh(tmp_path):
    options = on_the_host(output=tmp_path / "out", requests=2, batch=64)
    assert run(options) == 0
    assert run(options) == 0


def test_a_wrong_row_in_a_model_directory_ends_with_1(tmp_path, monkeypatch, capsys):
    write = deployment.write_deployment

    def write_and_damage(*args, **kwargs):
        deployed = write(*args, **kwargs)
        path = deployed.config.parent / "model" / "deep" / "emb_vector"
        rows = np.memmap(path, "<u4", "r+")
        rows[5] ^= 1
        rows.flush()
        return deployed

    monkeypatch.setattr(job, "write_deployment", write_and_damage)
    output = tmp_path / "out"
    code = run(on_the_host(output=output, requests=2, batch=64, update_share=0.0))
    report = json.loads((output / "report.json").read_text())
    assert code == 1
    assert report["wrong_rows"] > 0
    assert set(report["checks"]["after a restart"]["wrong_by_kind"]) == {
        "not a row of this key"
    }
    assert report["checks"]["after a restart"]["wrong_rows"] == 1
    assert report["examples"][0].startswith("table deep, key 0: not a row of this key")
    assert "wrong: table deep, key 0" in capsys.readouterr().out


def test_an_old_row_in_the_server_ends_with_1(tmp_path, monkeypatch):
    sweep = job.sweep

    def undo_and_sweep(server, workload, *, ledgers, advance):
        deep = workload.tables[1]
        position = int(np.argmax(ledgers["deep"].acknowledged))
        key = deep.ids[[position]]
        old = known_rows(deep.salt, key, 1, dim=deep.dim, default=deep.default)
        server.update("wdl", "deep", key, old)
        return sweep(server, workload, ledgers=ledgers, advance=advance)

    monkeypatch.setattr(job, "sweep", undo_and_sweep)
    output = tmp_path / "out"
    assert run(on_the_host(output=output, requests=4, batch=64)) == 1
    checks = json.loads((output / "report.json").read_text())["checks"]
    assert checks["in the replay"]["wrong_rows"] == 0
    assert checks["after a restart"]["wrong_by_kind"] == {"stale version": 1}


def test_a_failing_lookup_ends_the_run_and_its_updater(tmp_path, monkeypatch):
    class BrokenError(Exception):
        pass

    def replay(*_, updater, **__):
        updater.advance(0.5)
        raise BrokenError

    monkeypatch.setattr(job, "replay", replay)
    with pytest.raises(BrokenError):
        run(on_the_host(output=tmp_path / "out", requests=2, batch=64))


def write_trace(path, n_ids=3000, n_keys=20_000):
    rng = np.random.default_rng(3)
    ids = rng.integers(-(1 << 63), 1 << 63, n_ids)
    np.save(path, ids[rng.zipf(1.3, n_keys) % n_ids])
    return path


def test_a_trace_is_replayed_and_checked(tmp_path):
    path = write_trace(tmp_path / "keys.npy")
    output = tmp_path / "out"
    code = run(on_the_host(output=output, trace=path, batch=1000))
    report = json.loads((output / "report.json").read_text())
    assert code == 0
    assert (report["requests"], report["keys"]) == (20, 20_000)
    assert report["data"]["title"] == "trace keys.npy"
    assert report["machine"]["gpu"] is None
    assert report["wrong_rows"] == 0
    assert report["updates"]["rows"] > 0


@pytest.mark.device
def test_on_a_gpu_every_row_comes_through_its_cache(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    path, output = write_trace(tmp_path / "keys.npy", 900, 6000), tmp_path / "out"
    assert run(DemoOptions(output=output, trace=path, batch=500)) == 0
    report = json.loads((output / "report.json").read_text())
    cache, host, _ = report["tiers"]
    name = report["machine"]["gpu"]
    assert report["path"] == f"GPU cache over host memory + RocksDB on {name}"
    tiers = [tier["tier"] for tier in report["tiers"]]
    assert tiers == ["gpu:0", "host", "rocksdb"]
    assert cache["asked"] == report["keys"] + report["updates"]["rows"]
    assert 0 < cache["hits"] < cache["asked"]
    assert 0 < host["asked"] < cache["asked"]
    assert report["checks"]["right after their update"]["rows"] > 0
    assert report["wrong_rows"] == 0
    printed = capsys.readouterr().out
    assert report["path"] in printed
    assert "GPU cache hit rate" in printed
    assert (output / "demo.png").read_bytes().startswith(PNG_SIGNATURE)


@pytest.mark.device
def test_a_gpu_is_left_alone_on_request(tmp_path):
    path, output = write_trace(tmp_path / "keys.npy", 300, 1000), tmp_path / "out"
    assert run(on_the_host(output=output, trace=path, batch=500)) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["path"] == "host memory + RocksDB, no GPU"
