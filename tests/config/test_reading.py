"""Whole files, spellings, defaults, and what is logged about them."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import hps_numba as hps
from hps_numba.config import (
    DatabaseType,
    EmbeddingCacheType,
    GpuCachePolicy,
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
    content = json.loads(path.read_text())
    for model in content["models"]:  # one of them has a quoted number
        model["hit_rate_threshold"] = float(model["hit_rate_threshold"])
    jsonschema.validate(content, json.loads(schema_text()))


@pytest.mark.parametrize("block", [None, "volatile_db", "persistent_db"])
def test_an_unknown_key_does_not_fit_the_schema(block: str | None) -> None:
    content = json.loads((ROOT / "tests/data/ps/complete.json").read_text())
    (content[block] if block else content)["surprise"] = 1
    with pytest.raises(jsonschema.ValidationError, match="surprise"):
        jsonschema.validate(content, json.loads(schema_text()))


def test_every_key_is_described() -> None:
    schema = json.loads(schema_text())
    objects = [schema, *(d for d in schema["$defs"].values() if "properties" in d)]
    assert len(objects) == 5
    for one in objects:
        for key, described in one["properties"].items():
            assert key == "$schema" or described["description"].strip(), key


def test_the_module_prints_the_schema() -> None:
    command = [sys.executable, "-m", "hps_numba.config"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == schema_text()


def test_a_configuration_needs_neither_compiler_nor_store() -> None:
    code = (
        "import sys, hps_numba.config; print({'numba', 'rocksdict'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_what_is_written_reads_back_as_it_was(path: Path, tmp_path: Path) -> None:
    config = hps.ParameterServerConfig.from_json(path)
    written = config.model_dump(mode="json", by_alias=True)
    assert written["volatile_db"].pop("password") == ""
    assert read(written, tmp_path) == config


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
        "redis_timeout_ms": 1000,
        "redis_connect_timeout_ms": 1000,
        "redis_wait_replicas": 0,
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
        "initial_offset": "earliest",
        "offset_reset": "earliest",
        "burst_rows": 16_384,
        "dead_letter_file": None,
        "dead_letter_topic": None,
        "kafka": {},
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
    assert (model.require_gpu, model.gpu_cache_bytes) == (False, None)
    assert model.gpu_cache_policy is GpuCachePolicy.LRU
    assert model.warm_up_rows_per_table is None
    assert model.warm_up_keys_per_table is None


def test_a_volatile_block_without_type_is_disabled_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = read({"volatile_db": {}, **minimal()}, tmp_path)
    assert config.volatile_db.type is DatabaseType.DISABLED
    assert "volatile_db" in caplog.text
    assert hps.VolatileDatabaseParams().type is DatabaseType.PARALLEL_HASH_MAP


@pytest.mark.parametrize("block", ["persistent_db", "update_source"])
def test_any_block_without_type_is_warned_about(
    block: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = "path" if block == "persistent_db" else "brokers"
    config = read({block: {key: "there"}, **minimal()}, tmp_path)
    assert config.persistent_db.backend is DatabaseType.DISABLED
    assert config.update_source.type is UpdateSourceType.NULL
    assert f"{block}: has no type, which disables it" in caplog.text


def test_partitions_of_redis_do_not_depend_on_the_machine(tmp_path: Path) -> None:
    config = read({"volatile_db": {"type": "redis"}, **minimal()}, tmp_path)
    assert config.volatile_db.num_partitions == 16
    assert hps.VolatileDatabaseParams(type="redis").num_partitions == 16


def test_keys_of_older_releases_are_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    volatile = {"type": "hash_map", "algorithm": "phm"}
    source = {"type": "null", "max_receive_buffer_size": 2000}
    content = {"volatile_db": volatile, "update_source": source, **minimal()}
    config = read({"$schema": "ps.schema.json", **content}, tmp_path)
    assert config.update_source.receive_buffer_size == 262_144
    assert "volatile_db.algorithm: obsolete" in caplog.text
    assert "update_source.max_receive_buffer_size: obsolete" in caplog.text
    assert len(caplog.messages) == 2


def test_databases_of_a_single_model_are_ignored_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hps.InferenceParams("wdl", volatile_db=hps.VolatileDatabaseParams())
    assert "volatile_db: obsolete, and ignored: the server has one" in caplog.text


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


def test_positional_arguments_come_in_the_order_of_hugectr() -> None:
    volatile = hps.VolatileDatabaseParams(
        hps.DatabaseType_t.redis_cluster, "h:1", "user", "secret", 15, 1 << 28, 1 << 30,
        "name", False, 7, 1000, True, "ca", "cert", "key", "sni", 500,
        hps.DatabaseOverflowPolicy_t.evict_oldest, 0.5, False, 1.0, True, ["wdl"],
    )  # fmt: skip
    assert volatile == hps.VolatileDatabaseParams(
        type="redis_cluster",
        address="h:1",
        user_name="user",
        password="secret",
        num_partitions=15,
        shared_memory_size=1 << 30,
        shared_memory_name="name",
        shared_memory_auto_remove=False,
        num_node_connections=7,
        max_batch_size=1000,
        enable_tls=True,
        tls_ca_certificate="ca",
        tls_client_certificate="cert",
        tls_client_key="key",
        tls_server_name_identification="sni",
        overflow_margin=500,
        overflow_policy="evict_oldest",
        overflow_resolution_target=0.5,
        initialize_after_startup=False,
        cache_missed_embeddings=True,
        update_filters=["wdl"],
    )
    persistent = hps.PersistentDatabaseParams("rocks_db", "/db", 2, True, 10, False, [])
    assert persistent == hps.PersistentDatabaseParams(
        backend="rocks_db",
        path="/db",
        num_threads=2,
        read_only=True,
        max_batch_size=10,
        initialize_after_startup=False,
        update_filters=[],
    )
    order = hps.InferenceParams.argument_order()
    assert order[:9] == (
        "model_name",
        "max_batchsize",
        "hit_rate_threshold",
        "dense_model_file",
        "sparse_model_files",
        "device_id",
        "use_gpu_embedding_cache",
        "cache_size_percentage",
        "i64_input_key",
    )
    assert order[18:23] == (
        "default_value_for_each_table",
        "volatile_db",
        "persistent_db",
        "update_source",
        "maxnum_des_feature_per_sample",
    )


def test_the_width_of_keys_is_one_for_all_models(tmp_path: Path) -> None:
    from_json = read({"supportlonglong": False, **minimal()}, tmp_path)
    (entry,) = minimal()["models"]
    params = hps.InferenceParams(**entry, i64_input_key=False)
    from_python = hps.ParameterServerConfig(inference_params_array=[params])
    assert from_python == from_json
    assert from_python.supportlonglong is False
    assert from_json.models[0].i64_input_key is False
    other = hps.InferenceParams(**{**entry, "model": "other"}, i64_input_key=True)
    with pytest.raises(hps.ConfigError, match=r"models\[1\].i64_input_key: differs"):
        hps.ParameterServerConfig(models=[params, other])


def test_a_static_table_is_a_static_cache(tmp_path: Path) -> None:
    config = read(minimal(use_static_table=True), tmp_path)
    assert config.models[0].embedding_cache_type is EmbeddingCacheType.STATIC


@pytest.mark.parametrize("kind", ["uvm", "stochastic"])
def test_a_cache_type_that_is_served_as_dynamic_gets_one_line(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = read(minimal(embedding_cache_type=kind.upper()), tmp_path)
    assert config.models[0].embedding_cache_type is EmbeddingCacheType(kind)
    assert len(caplog.messages) == 1
    text = f"models[0].embedding_cache_type: {kind} is served as dynamic"
    assert caplog.messages[0].endswith(text)
    read(minimal(embedding_cache_type=kind, gpucache=False), tmp_path)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("fp8_quant", True, "rows are stored as row_dtype_per_table says"),
        ("enable_pagelock", True, "cached rows are in device memory"),
        (
            "num_of_refresher_buffer_in_pool",
            2,
            "the tables of a GPU cache are refreshed one after the other",
        ),
        ("use_context_stream", False, "a lookup runs on the stream that it is given"),
    ],
)
def test_what_the_gpu_cache_does_not_do_is_told(
    key: str,
    value: Any,
    reason: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    read(minimal(**{key: value}), tmp_path)
    assert [message.split(": ", 1)[1] for message in caplog.messages] == [
        f"models[0].{key}: has no effect: {reason}"
    ]


def test_the_keys_of_the_gpu_cache_are_read(tmp_path: Path) -> None:
    (model,) = read(
        minimal(
            require_gpu=True,
            gpu_cache_bytes=1 << 30,
            gpu_cache_policy="LFU",
            warm_up_rows_per_table=[0, 500],
            warm_up_keys_per_table=["", "hot.npy"],
        ),
        tmp_path,
    ).models
    assert (model.require_gpu, model.gpu_cache_bytes) == (True, 1 << 30)
    assert model.gpu_cache_policy is GpuCachePolicy.LFU
    assert model.warm_up_rows_per_table == (0, 500)
    assert model.warm_up_keys_per_table == ("", "hot.npy")


def test_numbers_of_numpy_are_numbers() -> None:
    params = hps.InferenceParams(
        "wdl",
        max_batchsize=np.int32(8),
        cache_size_percentage=np.float32(0.5),
        embedding_vecsize_per_table=[np.int64(16)],
        sparse_model_files=[Path("a")],
    )
    assert (params.max_batchsize, params.cache_size_percentage) == (8, 0.5)
    assert params.embedding_vecsize_per_table == (16,)
    assert params.sparse_model_files == ("a",)


def test_text_that_holds_numbers_and_booleans_is_read_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = minimal(
        gpucache="false", max_batch_size="32", deployed_device_list=["0", "1"]
    )
    (model,) = read(content, tmp_path).models
    assert model.use_gpu_embedding_cache is False
    assert (model.max_batchsize, model.deployed_devices) == (32, (0, 1))
    (message,) = caplog.messages
    for key in ("gpucache", "max_batch_size", "deployed_device_list[1]"):
        assert f"models[0].{key}" in message


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
        ("^wdl$|^dlrm$", "hps_et.dlrm.deep", True),
        ("^wdl$|^dlrm$", "hps_et.dlrm2.deep", False),
        ("w[$^d]l", "hps_et.wdl.deep", True),
        ("w[^d]l", "hps_et.wdl.deep", False),
        ("hps_wdl", "hps_et.hps_wdl.deep", True),
        ("deep", "hps_et.wdl.deep", False),
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


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_password_file_that_cannot_be_read_is_named(
    content: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content)
    config = hps.VolatileDatabaseParams(password_file=path)
    with pytest.raises(hps.ConfigError, match=r"password_file: .* cannot be read"):
        config.resolve_password()


def test_a_client_certificate_is_shown_only_if_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    untold = hps.VolatileDatabaseParams()
    assert untold.client_certificate() == (None, None)
    assert hps.VolatileDatabaseParams(
        **untold.model_dump(exclude={"password"})
    ).client_certificate() == (None, None)
    for name in ("client_cert.pem", "client_key.pem", "mine.pem"):
        (tmp_path / name).touch()
    assert untold.client_certificate() == ("client_cert.pem", "client_key.pem")
    mine = hps.VolatileDatabaseParams(tls_client_certificate=str(tmp_path / "mine.pem"))
    assert mine.client_certificate() == (str(tmp_path / "mine.pem"), "client_key.pem")


@pytest.mark.parametrize("name", ["tls_client_certificate", "tls_client_key"])
def test_a_client_certificate_that_is_missing_is_named(
    name: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "absent.pem")
    config = hps.VolatileDatabaseParams(**{name: path})
    with pytest.raises(hps.ConfigError, match=rf"volatile_db\.{name}: .*absent\.pem"):
        config.client_certificate()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("redis_timeout_ms", 0),
        ("redis_connect_timeout_ms", 86_400_001),
        ("redis_wait_replicas", -1),
    ],
)
def test_times_and_replicas_of_redis_have_limits(name: str, value: int) -> None:
    with pytest.raises(hps.ConfigError, match=f"{name}: .*an integer from"):
        hps.VolatileDatabaseParams(**{name: value})
