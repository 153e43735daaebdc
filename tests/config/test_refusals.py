"""Every wrong value is refused with its path; messages help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

import hps_numba as hps
from hps_numba.config import (
    InferenceParams,
    ParameterServerConfig,
    PersistentDatabaseParams,
    UpdateSourceParams,
    VolatileDatabaseParams,
)
from hps_numba.config.enums import Spellings
from hps_numba.config.fields import MAX_SIZE, Kind, kinds
from hps_numba.config.kafka import KafkaSettings

BLOCKS = {
    "": ParameterServerConfig,
    "volatile_db": VolatileDatabaseParams,
    "persistent_db": PersistentDatabaseParams,
    "update_source": UpdateSourceParams,
    "models[0]": InferenceParams,
}
FIELDS = [
    (block, name, field.alias or name)
    for block, model in BLOCKS.items()
    for name, field in model.model_fields.items()
    if kinds(model)[name].nested is None
]


def content(block: str, key: str, value: Any) -> dict[str, Any]:
    """Return a fine ps.json but for one value."""
    model: dict[str, Any] = {
        "model": "wdl",
        "sparse_files": ["a"],
        "embedding_vecsize_per_table": [16],
    }
    whole: dict[str, Any] = {"models": [model]}
    if block == "models[0]":
        model[key] = value
    elif block:
        whole[block] = {"type": "disabled", key: value}
        if block == "update_source" and key != "type":
            whole[block]["type"] = "null"
    else:
        whole[key] = value
    return whole


def wrong(kind: Kind) -> st.SearchStrategy[Any]:
    """Draw JSON values that a field does not take."""
    if kind.many:
        entry = wrong(kind.one())
        return st.one_of(
            st.integers(),
            st.text(),
            st.booleans(),
            st.lists(entry, min_size=1, max_size=2),
        )
    letters = st.text("xyz", min_size=1, max_size=6)
    objects = st.dictionaries(letters, st.integers(), min_size=1, max_size=1)
    shapes: list[st.SearchStrategy[Any]] = [
        st.lists(st.integers(), max_size=2),
        objects,
    ]
    if not kind.optional:
        shapes.append(st.none())
    if any(isinstance(limit, Spellings) for limit in kind.limits):
        return st.one_of(*shapes, st.integers(), st.booleans(), letters)
    if kind.base is bool:
        return st.one_of(*shapes, st.integers(), st.floats(0.1, 0.9), letters)
    if kind.base in (int, float):
        shapes += [letters, st.booleans()]
        if kind.base is int:
            shapes += [st.floats(0.1, 0.9), st.integers(MAX_SIZE + 1, 2**70)]
        return st.one_of(*shapes)
    if kind.base is KafkaSettings:
        values = st.one_of(st.none(), st.lists(st.integers(), max_size=2))
        odd = st.dictionaries(letters, values, min_size=1, max_size=2)
        scalars = (st.integers(), st.booleans(), st.none(), letters, st.lists(letters))
        return st.one_of(odd, *scalars)
    assert kind.base in (str, SecretStr), kind
    return st.one_of(*shapes, st.integers(), st.booleans(), st.floats(0.1, 0.9))


@pytest.mark.parametrize(("block", "name", "key"), FIELDS, ids=lambda v: str(v))
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_wrong_type_is_refused_with_its_path(
    block: str, name: str, key: str, tmp_path: Path, data: st.DataObject
) -> None:
    value = data.draw(wrong(kinds(BLOCKS[block])[name]))
    path = tmp_path / "ps.json"
    path.write_text(json.dumps(content(block, key, value)))
    with pytest.raises(hps.ConfigError) as caught:
        ParameterServerConfig.from_json(path)
    assert f"{block}.{key}".lstrip(".") in str(caught.value)


NESTED = [("", "volatile_db"), ("", "persistent_db"), ("", "update_source")]


@pytest.mark.parametrize("value", [None, True, 3, "redis", [], [{}]], ids=repr)
@pytest.mark.parametrize(("block", "key"), NESTED)
def test_a_block_that_is_no_object_is_refused(
    block: str, key: str, value: Any, tmp_path: Path
) -> None:
    message = refused(content(block, key, value), tmp_path)
    assert f"{key}: " in message
    assert "is not an object" in message


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({}, "models: an object is not a list"),
        ("wdl", 'models: "wdl" is not a list'),
        ([3], "models[0]: 3 is not an object"),
        ([{}], "models[0].model: missing; needs a string that matches"),
    ],
)
def test_models_that_are_no_list_of_objects_are_refused(
    value: Any, text: str, tmp_path: Path
) -> None:
    assert text in refused({"models": value}, tmp_path)


def test_an_entry_of_a_list_is_refused_with_its_position(tmp_path: Path) -> None:
    config = content("models[0]", "deployed_device_list", [0, 1.5, "x"])
    message = refused(config, tmp_path)
    assert "models[0].deployed_device_list[1]: 1.5 is not an integer" in message
    assert 'models[0].deployed_device_list[2]: "x" is not an integer' in message


def refused(config: dict[str, Any], tmp_path: Path) -> str:
    path = tmp_path / "ps.json"
    path.write_text(json.dumps(config))
    with pytest.raises(hps.ConfigError) as caught:
        ParameterServerConfig.from_json(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("block", "key", "value", "text"),
    [
        ("models[0]", "gpucacheper", 1.5, "1.5 is not a number from 0 to 1"),
        ("models[0]", "hit_rate_threshold", -1, "-1 is not a number of at least 0"),
        ("models[0]", "max_batch_size", 0, "0 is not an integer from 1"),
        ("models[0]", "model", "a b", '"a b" is not a string that matches'),
        ("models[0]", "embedding_vecsize_per_table", [0], "[0]: 0 is not an integer"),
        ("volatile_db", "type", "redi", 'did you mean "redis"?'),
        ("volatile_db", "overflow_resolution_target", 0, "above 0 and at most 1"),
        ("volatile_db", "num_partitions", 10**9, "from 1 to 65536"),
        ("volatile_db", "num_partitions", "9" * 5000, "from 1 to 65536"),
        ("persistent_db", "num_threads", 10**9, "from 1 to 65536"),
        ("volatile_db", "update_filters", ["(?i)wdl"], "global flags"),
        ("volatile_db", "update_filters", ["("], "is not a regular expression"),
        ("update_source", "receive_buffer_size", 100, "from 1024"),
        ("update_source", "metadata_refresh_interval_ms", 9, "from 10"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(
    block: str, key: str, value: Any, text: str, tmp_path: Path
) -> None:
    message = refused(content(block, key, value), tmp_path)
    assert f"{block}.{key}" in message
    assert text in message


@pytest.mark.parametrize(
    ("block", "key", "near"),
    [
        ("models[0]", "gpucacheperc", "gpucacheper"),
        ("models[0]", "sparse_file", "sparse_files"),
        ("volatile_db", "adress", "address"),
        ("", "volatil_db", "volatile_db"),
        ("", "cpu_memory_db", "volatile_db"),
    ],
)
def test_a_typo_gets_the_nearest_name(
    block: str, key: str, near: str, tmp_path: Path
) -> None:
    message = refused(content(block, key, 1), tmp_path)
    assert f'unknown key; did you mean "{near}"?' in message


def test_unknown_keys_are_logged_if_not_strict(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ps.json"
    path.write_text(json.dumps(content("models[0]", "gpucacheperc", 1)))
    config = ParameterServerConfig.from_json(path, strict=False)
    assert config.models[0].cache_size_percentage == 0.2
    assert 'models[0].gpucacheperc: unknown key; did you mean "gpucacheper"?' in (
        caplog.text
    )


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    config = content("models[0]", "gpucacheper", 2)
    config["models"][0]["max_batch_size"] = "many"
    config["on_tier_failure"] = "hope"
    message = refused(config, tmp_path)
    assert "3 problems" in message
    for path in (
        "models[0].gpucacheper",
        "models[0].max_batch_size",
        "on_tier_failure",
    ):
        assert path in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON at line 1 column 1"),
        ('{"models": [}', "not valid JSON at line 1"),
        ("[]", "must hold a JSON object"),
        ('{"models": [], "models": []}', "is given twice"),
        ('{"models": [], "supportlonglong": NaN}', "NaN is not allowed"),
        ("{}", "models: missing"),
        ('{"models": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ('{"models": ' + "[" * 100_000, "nested too deeply"),
        ('{"models": []}', "needs at least one model"),
    ],
)
def test_a_malformed_file_says_where(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "ps.json"
    path.write_text(text)
    with pytest.raises(hps.ConfigError, match=r"ps\.json") as caught:
        ParameterServerConfig.from_json(path)
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(hps.ConfigError, match=r"nowhere\.json: cannot be read"):
        ParameterServerConfig.from_json(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"embedding_vecsize_per_table": [1, 2]},
            "embedding_vecsize_per_table: has 2 entries for 1 tables",
        ),
        (
            {"default_value_for_each_table": [0.0, 1.0]},
            "default_value_for_each_table: has 2 entries for 1 tables",
        ),
        ({"host_bytes_per_table": [1, 2]}, "host_bytes_per_table: has 2 entries"),
        ({"warm_up_rows_per_table": [1, 2]}, "warm_up_rows_per_table: has 2 entries"),
        ({"warm_up_keys_per_table": ["", ""]}, "warm_up_keys_per_table: has 2 entries"),
        (
            {"require_gpu": True, "gpucache": False},
            "require_gpu: is true although gpucache is false",
        ),
        ({"deployed_device_list": []}, "deployed_devices: needs at least one device"),
        (
            {
                "sparse_files": ["a", "b"],
                "embedding_table_names": ["t", "t"],
                "embedding_vecsize_per_table": [1, 1],
                "maxnum_catfeature_query_per_table_per_sample": [1, 1],
            },
            'embedding_table_names[1]: "t" is used twice',
        ),
    ],
)
def test_lists_that_disagree_are_refused(
    changes: dict[str, Any], text: str, tmp_path: Path
) -> None:
    config = content("", "supportlonglong", True)
    config["models"][0].update(changes)
    assert text.replace("deployed_devices", "deployed_device_list") in refused(
        config, tmp_path
    )


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    config = content("", "supportlonglong", True)
    config["models"] *= 2
    assert 'models[1].model: "wdl" is used twice' in refused(config, tmp_path)


def test_redis_needs_as_many_partitions_as_connections(tmp_path: Path) -> None:
    config = content("", "supportlonglong", True)
    config["volatile_db"] = {"type": "redis", "num_partitions": 3}
    assert "volatile_db.num_partitions: 3 is less than" in refused(config, tmp_path)


def test_parts_of_host_memory_fit_the_whole(tmp_path: Path) -> None:
    config = content("models[0]", "host_bytes_per_table", [2000])
    config["volatile_db"] = {"type": "hash_map", "max_bytes": 1999}
    text = "volatile_db.max_bytes: 1999 is less than all host_bytes_per_table"
    assert text in refused(config, tmp_path)
    config["volatile_db"]["max_bytes"] = 2000
    path = tmp_path / "ps.json"
    path.write_text(json.dumps(config))
    assert ParameterServerConfig.from_json(path).volatile_db.max_bytes == 2000


def test_a_password_comes_from_one_place(tmp_path: Path) -> None:
    config = content("", "supportlonglong", True)
    config["volatile_db"] = {
        "type": "redis",
        "password": "hunter2",
        "password_env": "REDIS_PASSWORD",
    }
    message = refused(config, tmp_path)
    assert "volatile_db.password_env: is given beside password" in message
    assert "hunter2" not in message


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"embedding_vec_size": [16]}, "embedding_vec_size: is not a mapping"),
        ({"embedding_vec_size": {"dlrm": [16]}}, 'models: has no model "dlrm"'),
        ({"models": []}, "is also given as inference_params_array"),
        ({"embedding_vec_size": {"wdl": [1, 2]}}, "has 2 entries for 1 tables"),
    ],
)
def test_python_arguments_that_disagree_are_refused(
    arguments: dict[str, Any], text: str
) -> None:
    params = InferenceParams("wdl", sparse_model_files=["a"])
    with pytest.raises(hps.ConfigError) as caught:
        ParameterServerConfig(inference_params_array=[params], **arguments)
    assert text in str(caught.value)


def test_a_missing_argument_has_its_name_in_python() -> None:
    with pytest.raises(hps.ConfigError, match="InferenceParams: model_name: missing"):
        InferenceParams()


def test_a_key_in_two_spellings_is_refused() -> None:
    with pytest.raises(hps.ConfigError, match='is also given as "model"'):
        InferenceParams(model="a", model_name="b")


def test_a_secret_is_not_in_the_message(tmp_path: Path) -> None:
    message = refused(content("volatile_db", "password", ["hunter2"]), tmp_path)
    assert "volatile_db.password" in message
    assert "hunter2" not in message


def test_configurations_are_immutable() -> None:
    params = hps.VolatileDatabaseParams()
    with pytest.raises(hps.ConfigError, match="immutable"):
        params.num_partitions = 3
    assert params.replace(num_partitions=3).num_partitions == 3
