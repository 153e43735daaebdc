"""``hps-numba produce``: from files to what brokers hold."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from hps_numba.cli import app
from hps_numba.tiers.model_files import write_model_directory
from tests.runtime.updates.test_producer import check_places, read, replay
from tests.support.kafka_broker import KafkaBroker

pytestmark = pytest.mark.service

TOPIC = "hps_et.wdl.item"
TABLE = ("--model", "wdl", "--table", "item")
KEYS = np.array([-7, 2**62, 3, 4, -7])
ROWS = np.arange(10, dtype=np.float32).reshape(5, 2)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["produce", *map(str, arguments)])


@pytest.fixture(scope="module")
def broker() -> Iterator[KafkaBroker]:
    with KafkaBroker() as started:
        yield started


@pytest.fixture
def topic(broker: KafkaBroker) -> str:
    broker.create_topic(TOPIC, 4)
    return TOPIC


def newest() -> dict[int, bytes]:
    pairs = zip(KEYS.tolist(), ROWS, strict=True)
    return {key: row.tobytes() for key, row in pairs}


def test_a_model_directory_is_published_row_by_row(
    broker: KafkaBroker, topic: str, tmp_path: Path
) -> None:
    write_model_directory(tmp_path, KEYS, ROWS)
    result = run(broker.bootstrap, tmp_path, *TABLE, "--json", "--partitions", 5)
    assert result.exit_code == 0, result.output
    messages = read(broker.bootstrap, TOPIC, 5)
    check_places(messages, 5, 4)
    assert replay(messages) == newest()
    printed = json.loads(result.stdout)
    assert printed.pop("seconds") >= 0
    assert printed == {
        "topic": TOPIC,
        "deleted": False,
        "rows": 5,
        "messages": len(messages),
        "bytes": 5 * 16 + 8 * len(messages),
    }


def test_arrays_are_published_and_deleted(
    broker: KafkaBroker, topic: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "rows.npz", keys=KEYS, rows=ROWS)
    np.savez(tmp_path / "keys.npz", keys=np.uint32([3, 4]))
    one = (*TABLE, "--partitions", 1)
    first = run(broker.bootstrap, tmp_path / "rows.npz", *one)
    assert first.exit_code == 0, first.output
    text = "hps_et.wdl.item: 5 rows, 1 messages, 88 bytes, "
    assert first.stdout.startswith(text)
    second = run(broker.bootstrap, tmp_path / "keys.npz", *one, "--delete")
    text = "hps_et.wdl.item: 2 deletions, 1 messages, 24 bytes, "
    assert second.stdout.startswith(text)
    table = replay(read(broker.bootstrap, TOPIC, 7))
    assert table == {k: v for k, v in newest().items() if k not in (3, 4)}


def test_more_rows_than_a_block_arrive_in_messages_of_the_size_given(
    broker: KafkaBroker, topic: str, tmp_path: Path
) -> None:
    keys = np.arange(20_000)
    rows = np.random.default_rng(0).random((20_000, 8), np.float32)
    write_model_directory(tmp_path, keys, rows)
    result = run(broker.bootstrap, tmp_path, *TABLE, "--message-bytes", 20_000)
    assert result.exit_code == 0, result.output
    messages = read(broker.bootstrap, TOPIC, 20_000)
    assert replay(messages) == {int(k): rows[k].tobytes() for k in keys}
    assert max(len(records) for _, _, records in messages) == (20_000 - 136) // 40


def test_settings_reach_the_client(
    broker: KafkaBroker, topic: str, tmp_path: Path
) -> None:
    write_model_directory(tmp_path, KEYS, ROWS)
    setting = ("--setting", "compression.type=zstd", "--setting", "client.id=a=b")
    result = run(broker.bootstrap, tmp_path, *TABLE, *setting)
    assert result.exit_code == 0, result.output
    assert replay(read(broker.bootstrap, TOPIC, 5)) == newest()
    wrong = run(broker.bootstrap, tmp_path, *TABLE, "--setting", "no.such=1")
    assert (wrong.exit_code, wrong.stdout) == (1, "")
    assert "error: Kafka settings: No such configuration" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--setting", "acks"), "'acks' is not name=value"),
        (("--partitions", "0"), "--partitions"),
        (("--message-bytes", "3"), "--message-bytes"),
        (("--table", "a b"), "cannot be a Kafka topic"),
    ],
)
def test_arguments_that_cannot_be_used_are_exit_code_2(
    broker: KafkaBroker, tmp_path: Path, arguments: tuple[str, str], text: str
) -> None:
    write_model_directory(tmp_path, KEYS, ROWS)
    result = run(broker.bootstrap, tmp_path, *TABLE, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert text in " ".join(result.stderr.replace("│", " ").split())


def test_brokers_that_do_not_answer_are_exit_code_1(tmp_path: Path) -> None:
    write_model_directory(tmp_path, KEYS, ROWS)
    result = run("127.0.0.1:9", tmp_path, *TABLE)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith("error: brokers do not answer: ")


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"keys": KEYS}, "has no array rows"),
        ({"k": KEYS}, "has no array keys and rows"),
        ({"keys": KEYS, "rows": ROWS[:4]}, r"rows of 5 keys are (5, dim); got (4, 2)"),
        ({"keys": KEYS, "rows": ROWS.astype(str)}, "rows are numbers (n, dim); got <U"),
        ({"keys": KEYS * 1.5, "rows": ROWS}, "keys are integers (n,); got float64"),
        ({"keys": np.array([{}]), "rows": ROWS}, "allow_pickle=False"),
    ],
)
def test_arrays_that_do_not_fit_are_named(
    tmp_path: Path, arrays: dict[str, np.ndarray], text: str
) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    result = run("127.0.0.1:9", tmp_path / "bad.npz", *TABLE)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"error: {tmp_path / 'bad.npz'}: " in result.stderr
    assert text in result.stderr


def test_a_source_that_is_not_there_or_no_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("text")
    for name in ("gone", "gone.npz", "text.npz"):
        result = run("127.0.0.1:9", tmp_path / name, *TABLE)
        assert (result.exit_code, result.stdout) == (1, "")
        assert str(tmp_path / name) in result.stderr


def test_without_the_client_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model_directory(tmp_path, KEYS, ROWS)
    for name in list(sys.modules):
        if name.startswith("hps_numba.runtime.updates"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    result = run("127.0.0.1:9", tmp_path, *TABLE)
    assert result.exit_code == 1
    assert 'pip install "hps-numba[kafka]"' in result.stderr
