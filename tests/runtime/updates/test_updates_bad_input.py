"""Messages that cannot be applied: skipped, counted, kept, and never in the way."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from confluent_kafka import Consumer, TopicPartition

from hps_numba.runtime.updates.frames import DELETE, encode
from tests.oracle import versioned_rows
from tests.runtime.updates.servers import PATIENCE_S, NewSite, Site, letters
from tests.support.redis_servers import wait_for

pytestmark = pytest.mark.service

KEYS = np.arange(10)


def frame(version: int, *, dim: int = 4, key_bytes: int = 8) -> bytes:
    rows = versioned_rows(KEYS, version, dim)
    return encode(KEYS, rows, key_bytes=8 if key_bytes == 8 else 4)


GOOD = frame(1)
BAD: dict[str, tuple[bytes | None, bytes | None]] = {  # by reason: key and value
    "keyed": (b"other", GOOD),
    "null_payload": (None, None),
    "magic": (None, b"XXXX" + GOOD[4:]),
    "truncated": (None, GOOD[:-1]),
    "value_size": (None, frame(1, dim=5)),
    "key_width": (None, frame(1, key_bytes=4)[: 8 + 3 * 20]),
}


def bad_messages(site: Site) -> None:
    """Publish one message of each kind, and beacons."""
    for key, value in BAD.values():
        site.produce(value, key=key)
    site.produce(GOOD[:8])  # a beacon
    site.produce(GOOD[:8], key=DELETE)


def test_bad_messages_are_skipped_counted_kept_and_not_read_again(
    new_site: NewSite, tmp_path: Path
) -> None:
    site = new_site(partitions=1)
    dead = tmp_path / "dead.jsonl"
    topic = f"dead.{site.model}"
    site.broker.create_topic(topic, 1)
    source = {"dead_letter_file": str(dead), "dead_letter_topic": topic}
    with site.server(source=source) as server:
        site.send(KEYS, 1)
        bad_messages(site)
        site.send(KEYS, 2)
        site.wait_equal(server)
        stream = site.stream(server)
        assert stream.skipped == dict.fromkeys(BAD, 1)
        assert stream.messages == len(BAD) + 4
        assert stream.rows == 20
        bad_messages(site)  # the last that is read
        assert server.updates.catch_up(PATIENCE_S)
        wait_for(
            lambda: site.stream(server).skipped == dict.fromkeys(BAD, 2),
            PATIENCE_S,
            what="skipped",
        )
        end = 2 * len(BAD) + 6
        wait_for(
            lambda: site.parts(server)[0].position.offset == end,
            PATIENCE_S,
            what="position",
        )
    kept = letters(dead)
    assert [letter["reason"].split(":")[0] for letter in kept] == list(BAD) * 2
    assert [letter["offset"] for letter in kept[: len(BAD)]] == list(
        range(1, 1 + len(BAD))
    )
    for letter, (key, value) in zip(kept, list(BAD.values()) * 2, strict=True):
        assert (decoded(letter["key"]), decoded(letter["value"])) == (key, value)
        assert letter["topic"] == site.topic()
    sent = read(site.broker.bootstrap, topic, len(kept))
    assert sent == [
        (message, letter["reason"])
        for message, letter in zip(list(BAD.values()) * 2, kept, strict=True)
    ]
    with site.server(source=source) as server:
        site.send(KEYS, 3)
        site.wait_equal(server)
        assert not site.stream(server).skipped
    assert letters(dead) == kept


def decoded(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)


def read(
    address: str, topic: str, n: int
) -> list[tuple[tuple[bytes | None, bytes | None], str]]:
    """Return key, value and reason of the messages in a topic of dead letters."""
    consumer = Consumer({"bootstrap.servers": address, "group.id": "t", "log_level": 0})
    consumer.assign([TopicPartition(topic, 0, 0)])
    found: list[tuple[tuple[bytes | None, bytes | None], str]] = []

    def more() -> bool:
        message = consumer.poll(0.1)
        if message is not None and message.error() is None:
            headers = dict(message.headers() or [])
            reason = headers["reason"]
            assert isinstance(reason, bytes)
            found.append(((message.key(), message.value()), reason.decode()))
        return len(found) == n

    wait_for(more, PATIENCE_S, what="dead letters")
    consumer.close()
    return found


def test_a_dead_letter_that_cannot_be_kept_stops_nothing(
    new_site: NewSite, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = new_site(partitions=1)
    source = {"dead_letter_file": str(tmp_path / "nowhere" / "dead.jsonl")}
    with site.server(source=source) as server:
        site.wait_followed(server)
        bad_messages(site)
        site.send(KEYS, 2)
        site.wait_equal(server)
        assert site.stream(server).skipped == dict.fromkeys(BAD, 1)
    assert "a dead letter is lost" in caplog.text


@pytest.mark.parametrize("n_rows", [2000, 60_000])
def test_a_message_larger_than_the_receive_buffer_is_applied(
    new_site: NewSite, n_rows: int
) -> None:
    site = new_site(partitions=1)
    keys = np.arange(n_rows)  # 24 bytes each
    with site.server(source={"receive_buffer_size": 2048}) as server:
        site.send(KEYS, 1)
        site.produce(encode(keys[:5], versioned_rows(keys[:5], 2, 4)))
        big = encode(keys[5:], versioned_rows(keys[5:], 3, 4))
        assert len(big) > 20 * 2048
        site.produce(big)
        site.send(keys[-3:], 4)
        site.replays["items"] = {
            key: 2 if key < 5 else 3 if key < n_rows - 3 else 4 for key in range(n_rows)
        }
        site.wait_equal(server)
        assert not site.stream(server).skipped


def test_what_stands_in_a_message_more_than_once_ends_with_the_last(
    new_site: NewSite,
) -> None:
    site = new_site(partitions=1)
    keys = np.array([1, 1, 2, 1])
    with site.server() as server:
        site.produce(encode(keys, versioned_rows(keys, [1, 2, 3, 4], 4)))
        site.produce(encode(keys[:2], None), key=DELETE)
        site.produce(encode(keys[2:3], versioned_rows(keys[2:3], 5, 4)))
        site.replays["items"] = {1: 0, 2: 5}
        site.wait_equal(server)


def test_dead_letters_are_lines_of_json(new_site: NewSite, tmp_path: Path) -> None:
    site = new_site(partitions=1)
    dead = tmp_path / "dead.jsonl"
    with site.server(source={"dead_letter_file": str(dead)}) as server:
        site.produce(b"\x00\xff\n", key=b"\n")
        site.send(KEYS, 1)
        site.wait_equal(server)
    (line,) = dead.read_text().splitlines()
    assert set(json.loads(line)) == {
        "topic",
        "partition",
        "offset",
        "timestamp_ms",
        "reason",
        "key",
        "value",
    }
