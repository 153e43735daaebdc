"""Whole files, spellings, defaults, and what is logged about them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import hps_numba as hps
from hps_numba.config import (
    DatabaseType,
    EmbeddingCacheType,
    UpdateSourceType,
    topic_pattern,
)
from hps_numba.config.reference import schema_text, with_tables
from hps_numba.types import OverflowPolicy, RowDtype

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "tests/data/ps").glob("*.json"))


def minimal(**changes: Any) -> dict[str, Any]:
    model = {
        "model": "wdl",
        "sparse_files": ["a", "b"],
        "embedding_vecsize_per_table": [1, 16],
        "maxnum_catfeature_query_per_table_per_sample": [2, 26],
    }
    return {"models": [{**model, **changes}]}


def read(content: Any, tmp_path: Path, *, strict: bool = True) -> Any:
    path = tmp_path / "ps.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return hps.ParameterServerConfig.from_json(path, strict=strict)


def test_the_complete_file_means_what_it_says() -> None:
    config = hps.ParameterServerConfig.from_json(ROOT / "tests/data/ps/complete.json")
    volatile, persistent = config.volatile_db, config.persistent_db
    assert volatile.type is DatabaseType.REDIS_CLUSTER
    assert volatile.num_partitions == 8
    assert volatile.overflow_policy is OverflowPolicy.EVICT_OLDEST
    assert volatile.overflow_margin == 10_000_000
    assert volatile.update_filters == (".+",)
    assert persistent.backend is DatabaseType.ROCKS_DB
    assert persistent.path == "/tmp/rocksdb"
    assert config.update_source.type is UpdateSourceType.KAFKA_MESSAGE_QUEUE
    wide, deep = config.model("hps_wdl").tables()
    assert (wide.tag, wide.dim, wide.max_keys) == (
        "hps_et.hps_wdl.embedding_table1",
        1,
        2048,
    )
    assert (deep.tag, deep.dim, deep.max_keys) == (
        "hps_et.hps_wdl.embedding_table2",
        16,
        26_624,
    )


def test_the_complete_file_needs_no_remark(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        hps.ParameterServerConfig.from_json(ROOT / "tests/data/ps/complete.json")
    assert caplog.messages == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_files_of_hugectr_load_unchanged(path: Path) -> None:
    config = hps.ParameterServerConfig.from_json(path)
    assert len(config.models[0].tables()) == 2


def test_obsolete_keys_get_one_line_each(caplog: pytest.LogCaptureFixture) -> None:
    path = ROOT / "tests/data/ps/continuous_training.json"
    config = hps.ParameterServerConfig.from_json(path)
    assert config.models[0].hit_rate_threshold == 0.9
    text = "\n".join(caplog.messages)
    for key in (
        "volatile_db.max_get_batch_size",
        "volatile_db.max_set_batch_size",
        "volatile_db.refresh_time_after_fetch",
        "persistent_db.max_get_batch_size",
        "persistent_db.max_set_batch_size",
        "models[0].hit_rate_threshold",
    ):
        assert text.count(key) == 1, key


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_files_of_hugectr_fit_the_schema(path: Path) -> None:
    schema = json.loads(schema_text())
    content = json.loads(path.read_text())
    for block in ("volatile_db", "persistent_db"):
        for key in ("max_get_batch_size", "max_set_batch_size"):
            content[block].pop(key, None)  # obsolete keys are not part of it
    content["volatile_db"].pop("refresh_time_after_fetch", None)
    for model in content["models"]:
        model["hit_rate_threshold"] = float(model["hit_rate_threshold"])
    jsonschema.validate(content, schema)


def test_the_schema_in_the_documentation_is_current() -> None:
    assert (ROOT / "docs/ps.schema.json").read_text() == schema_text()


def test_the_tables_in_the_documentation_are_current() -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    assert page == with_tables(page)
    assert page.count("| `") > 80


def test_defaults_are_those_of_hugectr(tmp_path: Path) -> None:
    config = read(minimal(), tmp_path)
    volatile, persistent = config.volatile_db, config.persistent_db
    source, model = config.update_source, config.models[0]
    assert config.supportlonglong is True
    assert volatile.model_dump(exclude={"password", "num_partitions"}) == {
        "type": DatabaseType.PARALLEL_HASH_MAP,
        "address": "127.0.0.1:7000",
        "user_name": "default",
        "password_env": None,
        "password_file": None,
        "allocation_rate": 268_435_456,
        "max_bytes": None,
        "shared_memory_size": 17_179_869_184,
        "shared_memory_name": "hctr_mp_hash_map_database",
        "shared_memory_auto_remove": True,
        "num_node_connections": 5,
        "max_batch_size": 65_536,
        "redis_layout": "strings",
        "enable_tls": False,
        "tls_ca_certificate": "cacertbundle.crt",
        "tls_client_certificate": "client_cert.pem",
        "tls_client_key": "client_key.pem",
        "tls_server_name_identification": "redis.localhost",
        "overflow_margin": 2**64 - 1,
        "overflow_policy": OverflowPolicy.EVICT_RANDOM,
        "overflow_resolution_target": 0.8,
        "initialize_after_startup": True,
        "initial_cache_rate": 1.0,
        "cache_missed_embeddings": False,
        "update_filters": ("^hps_.+$",),
    }
    assert 1 <= volatile.num_partitions <= 16
    assert (persistent.backend, persistent.num_threads) == (DatabaseType.DISABLED, 16)
    assert (persistent.read_only, persistent.max_batch_size) == (False, 65_536)
    assert persistent.path.endswith("/rocksdb")
    assert source.model_dump() == {
        "type": UpdateSourceType.NULL,
        "brokers": "127.0.0.1:9092",
        "metadata_refresh_interval_ms": 30_000,
        "receive_buffer_size": 262_144,
        "poll_timeout_ms": 500,
        "max_batch_size": 8_192,
        "failure_backoff_ms": 50,
        "max_commit_interval": 32,
    }
    assert model.max_batchsize == 64
    assert (model.hit_rate_threshold, model.cache_size_percentage) == (0.9, 0.2)
    assert model.use_gpu_embedding_cache is True
    assert model.number_of_worker_buffers_in_pool == 1
    assert model.number_of_refresh_buffers_in_pool == 1
    assert model.cache_refresh_percentage_per_iteration == 0.0
    assert model.deployed_devices == (0,)
    assert model.default_value_for_each_table == (0.0, 0.0)
    assert model.embedding_table_names == ("sparse_embedding0", "sparse_embedding1")
    assert (model.refresh_delay, model.refresh_interval) == (0.0, 0.0)
    assert model.embedding_cache_type is EmbeddingCacheType.DYNAMIC
    assert (model.thread_pool_size, model.init_ec) == (16, True)
    assert (model.enable_pagelock, model.fp8_quant) == (False, False)
    assert (model.use_static_table, model.use_context_stream) == (False, True)


def test_a_volatile_block_without_type_is_disabled_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = read({"volatile_db": {}, **minimal()}, tmp_path)
    assert config.volatile_db.type is DatabaseType.DISABLED
    assert "volatile_db" in caplog.text
    assert hps.VolatileDatabaseParams().type is DatabaseType.PARALLEL_HASH_MAP


@pytest.mark.parametrize(
    ("spelling", "kind"),
    [
        ("hashmap", DatabaseType.HASH_MAP),
        ("map", DatabaseType.HASH_MAP),
        ("parallel_hash", DatabaseType.PARALLEL_HASH_MAP),
        ("multi_process_map", DatabaseType.MULTI_PROCESS_HASH_MAP),
        ("none", DatabaseType.DISABLED),
        ("Redis_Cluster", DatabaseType.REDIS_CLUSTER),
        ("redis", DatabaseType.REDIS_CLUSTER),
    ],
)
def test_every_spelling_of_a_type_is_accepted(
    spelling: str, kind: DatabaseType, tmp_path: Path
) -> None:
    block = {"type": spelling, "num_partitions": 8}
    config = read({"volatile_db": block, **minimal()}, tmp_path)
    assert config.volatile_db.type is kind


def test_python_and_json_give_equal_objects(tmp_path: Path) -> None:
    from_json = read(
        {
            "volatile_db": {"type": "parallel_hash_map", "num_partitions": 4},
            "persistent_db": {"type": "rocks_db", "path": "/db"},
            **minimal(
                embedding_table_names=["wide", "deep"],
                default_value_for_each_table=[0.0, 0.0],
                max_batch_size=1024,
                hit_rate_threshold=1.0,
                gpucacheper=0.5,
            ),
        },
        tmp_path,
    )
    from_python = hps.ParameterServerConfig(
        emb_table_name={"wdl": ["wide", "deep"]},
        embedding_vec_size={"wdl": [1, 16]},
        max_feature_num_per_sample_per_emb_table={"wdl": [2, 26]},
        inference_params_array=[
            hps.InferenceParams(
                model_name="wdl",
                max_batchsize=1024,
                hit_rate_threshold=1.0,
                sparse_model_files=["a", "b"],
                cache_size_percentage=0.5,
            )
        ],
        volatile_db=hps.VolatileDatabaseParams(num_partitions=4),
        persistent_db=hps.PersistentDatabaseParams(
            backend=hps.DatabaseType_t.rocks_db, path="/db"
        ),
    )
    assert from_python == from_json
    assert from_python.replace(on_tier_failure="degrade") != from_json


def test_one_default_value_serves_all_tables_in_python_only(tmp_path: Path) -> None:
    files = {"sparse_files": ["a", "b"], "default_value_for_each_table": [0.5]}
    assert read(minimal(**files), tmp_path).models[0].default_value_for_each_table == (
        0.5,
        0.0,
    )
    params = hps.InferenceParams(model="wdl", **files)
    assert params.default_value_for_each_table == (0.5, 0.5)


def test_tables_without_files_take_names_and_dims(tmp_path: Path) -> None:
    config = read(
        {
            "models": [
                {
                    "model": "m",
                    "sparse_files": [],
                    "embedding_table_names": ["only"],
                    "embedding_vecsize_per_table": [8],
                    "row_dtype_per_table": ["float16"],
                }
            ]
        },
        tmp_path,
    )
    (table,) = config.models[0].tables()
    assert (table.name, table.dim, table.dtype) == ("only", 8, RowDtype.FLOAT16)
    assert table.max_keys == 64 * 26


def test_fractions_of_refresh_interval_are_kept(tmp_path: Path) -> None:
    assert read(minimal(refresh_interval=0.25), tmp_path).models[
        0
    ].refresh_interval == (0.25)


def test_keys_without_effect_are_noted_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read(minimal(refresh_delay=3), tmp_path)
    assert [m for m in caplog.messages if "refresh_delay" in m and "no effect" in m]
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("update_filter", "topic", "matches"),
    [
        ("^hps_.+$", "hps_et.wdl.deep", True),
        (".+", "hps_et.wdl.deep", True),
        ("wdl", "hps_et.wdl.deep", True),
        ("^wdl$", "hps_et.wdl.deep", True),
        ("wdl", "hps_et.wdl2.deep", False),
        ("wdl|dlrm", "hps_et.dlrm.deep", True),
        ("hps_et.wdl.deep", "hps_et.wdl.deep", True),
        ("^hps_et\\.wdl\\.wide$", "hps_et.wdl.deep", False),
        (".+", "__hps_beacon", False),
        ("^hps_.+$", "other_hps_et.wdl.deep", False),
    ],
)
def test_filters_match_what_is_documented(
    update_filter: str, topic: str, matches: bool
) -> None:
    assert bool(topic_pattern(update_filter).fullmatch(topic)) is matches


def test_passwords_come_from_elsewhere_and_are_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = hps.VolatileDatabaseParams(password="secret-1")
    assert plain.resolve_password() == "secret-1"
    monkeypatch.setenv("REDIS_PASSWORD", "secret-2")
    by_env = hps.VolatileDatabaseParams(password_env="REDIS_PASSWORD")
    assert by_env.resolve_password() == "secret-2"
    (tmp_path / "password").write_text("secret-3\n")
    by_file = hps.VolatileDatabaseParams(password_file=str(tmp_path / "password"))
    assert by_file.resolve_password() == "secret-3"
    for config in (plain, by_env, by_file):
        assert "secret-" not in repr(config) + str(config.model_dump())
    monkeypatch.delenv("REDIS_PASSWORD")
    with pytest.raises(hps.ConfigError, match="REDIS_PASSWORD is not set"):
        by_env.resolve_password()
