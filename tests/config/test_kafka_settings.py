"""Settings of librdkafka go through as they are, and their secrets are never shown."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

import hps_numba as hps
from hps_numba.config import ParameterServerConfig, UpdateSourceParams
from hps_numba.config.kafka import KafkaSettings

SETTINGS = {
    "security.protocol": "SASL_SSL",
    "sasl.username": "trainer",
    "sasl.password": "hunter2",
    "ssl.key.password": "hunter2",
    "ssl.key.pem": "-----hunter2-----",
    "sasl.oauthbearer.client.secret": "hunter2",
    "sasl.oauthbearer.config": "principal=hunter2",
    "socket.timeout.ms": 5000,
    "socket.keepalive.enable": True,
}


def config(kafka: Any, tmp_path: Path) -> ParameterServerConfig:
    model = {
        "model": "wdl",
        "sparse_files": ["a"],
        "embedding_vecsize_per_table": [16],
    }
    source = {"type": "kafka", "kafka": kafka}
    path = tmp_path / "ps.json"
    path.write_text(json.dumps({"models": [model], "update_source": source}))
    return ParameterServerConfig.from_json(path)


def test_settings_go_through_with_their_secrets(tmp_path: Path) -> None:
    read = config(SETTINGS, tmp_path).update_source
    assert read.kafka.plain() == SETTINGS
    assert read == UpdateSourceParams(type="kafka", kafka=SETTINGS)
    assert read.replace(burst_rows=1).kafka.plain() == SETTINGS
    assert pickle.loads(pickle.dumps(read)).kafka.plain() == SETTINGS
    assert copy.deepcopy(read) == read
    assert hash(read) == hash(UpdateSourceParams(type="kafka", kafka=SETTINGS))


def test_no_dump_shows_a_secret(tmp_path: Path) -> None:
    whole = config(SETTINGS, tmp_path)
    for shown in (repr(whole), str(whole.model_dump()), whole.model_dump_json()):
        assert "hunter2" not in shown
        assert "trainer" in shown
    assert "1234" not in repr(KafkaSettings({"sasl.password": 1234}))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("enable.auto.commit", "is not to be set"),
        ("auto.commit.enable", "is not to be set"),
        ("enable.auto.offset.store", "is not to be set"),
        ("enable.partition.eof", "is not to be set"),
        ("auto.offset.reset", "see update_source.offset_reset"),
        ("topic.auto.offset.reset", "see update_source.offset_reset"),
        ("bootstrap.servers", "update_source.brokers"),
        ("metadata.broker.list", "update_source.brokers"),
        ("default.topic.config", "is obsolete"),
    ],
)
def test_what_delivery_relies_on_is_refused(
    name: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(hps.ConfigError) as caught:
        config({name: "x"}, tmp_path)
    assert f"update_source.kafka: the value has {name}, which" in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize("value", [None, [], {}, ["hunter2"]])
def test_a_value_that_is_no_scalar_is_refused_unseen(
    value: object, tmp_path: Path
) -> None:
    with pytest.raises(hps.ConfigError, match=r"has sasl.password, which is not a str"):
        config({"sasl.password": value}, tmp_path)


def test_what_is_no_object_is_refused_unseen(tmp_path: Path) -> None:
    with pytest.raises(hps.ConfigError, match="an object of librdkafka") as caught:
        config("sasl.password=hunter2", tmp_path)
    assert "hunter2" not in str(caught.value)


def test_settings_cannot_be_changed() -> None:
    settings = UpdateSourceParams(kafka={"client.id": "a"}).kafka
    with pytest.raises(TypeError):
        settings["client.id"] = "b"  # type: ignore[index]
