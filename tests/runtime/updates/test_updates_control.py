"""What users may do with the streams: pause, resume, seek, catch up, watch, close."""

from __future__ import annotations

import threading
from time import time

import numpy as np
import pytest

from hps_numba.errors import (
    ClosedError,
    ConfigError,
    UnknownTableError,
    UpdateSourceError,
)
from hps_numba.runtime.hps import HPS
from hps_numba.runtime.updates.stats import StreamState
from hps_numba.types import Position
from tests.oracle import versions_in
from tests.runtime.deployments import Table
from tests.runtime.updates.servers import (
    ITEMS,
    PATIENCE_S,
    NewSite,
    Site,
)
from tests.support.redis_servers import wait_for

pytestmark = pytest.mark.service

USERS = Table("users", dim=8, n_rows=0, default=0.5)
KEYS = np.arange(100)


def versions(site: Site, server: HPS) -> set[int]:
    """Return the versions that lookups of ``KEYS`` see."""
    rows = np.asarray(server.lookup(KEYS, site.model, "items"))
    return set(versions_in(KEYS, rows).tolist())


def states(site: Site, server: HPS, table: str = "items") -> set[StreamState]:
    return {part.state for part in site.parts(server, table).values()}


def test_what_is_paused_waits_and_the_rest_goes_on(new_site: NewSite) -> None:
    site = new_site(tables=(ITEMS, USERS))
    with site.server() as server:
        site.send(KEYS, 1)
        site.wait_equal(server)
        server.updates.pause(site.model, "items")
        site.send(KEYS, 2)
        site.send(KEYS, 1, "users")
        site.wait_equal(server, table="users")
        assert states(site, server) == {StreamState.PAUSED}
        assert states(site, server, "users") == {StreamState.READING}
        assert not server.updates.catch_up(0.1)
        assert versions(site, server) == {1}
        server.updates.resume(site.model, "items")
        site.wait_equal(server)
        assert states(site, server) == {StreamState.READING}
        assert site.stream(server).rows == 200


def test_all_are_paused_but_the_one_that_is_resumed(new_site: NewSite) -> None:
    site = new_site(tables=(ITEMS, USERS))
    with site.server() as server:
        site.wait_followed(server)
        server.updates.pause()
        server.updates.resume(site.model, "users")
        site.send(KEYS, 1)
        site.send(KEYS, 1, "users")
        site.wait_equal(server, table="users")
        assert versions(site, server) == {-1}
        server.updates.resume()
        site.wait_equal(server)


def test_a_pause_holds_for_topics_and_partitions_to_come(new_site: NewSite) -> None:
    site = new_site()
    with site.server() as server:
        server.updates.pause()  # perhaps before the topic was found
        site.send(KEYS, 1)
        site.wait_followed(server)
        assert not server.updates.catch_up(0.1)
        assert states(site, server) == {StreamState.PAUSED}
        assert versions(site, server) == {-1}
        site.broker.delete_topic(site.topic())
        wait_for(lambda: not site.parts(server), PATIENCE_S, what="end of topic")
        site.broker.create_topic(site.topic(), 3)
        site.wait_followed(server)
        site.send(KEYS, 2)
        assert states(site, server) == {StreamState.PAUSED}
        assert not server.updates.catch_up(0.1)
        server.updates.resume()
        site.wait_equal(server)


@pytest.mark.parametrize("paused", [False, True])
def test_seek_back_applies_again_in_order(new_site: NewSite, paused: bool) -> None:
    site = new_site()
    with site.server() as server:
        for version in (1, 2, 3):
            site.send(KEYS, version)
        site.wait_equal(server)
        if paused:
            server.updates.pause(site.model, "items")
        server.updates.seek(site.model, "items", offset=1)
        if paused:
            places = {part.position for part in site.parts(server).values()}
            assert places == {Position(1)}
            assert states(site, server) == {StreamState.PAUSED}
            server.updates.resume(site.model, "items")
        wait_for(lambda: site.stream(server).rows == 500, PATIENCE_S, what="rows")
        site.wait_equal(server)


def test_seek_forwards_leaves_out_what_is_between(new_site: NewSite) -> None:
    site = new_site(partitions=1)
    with site.server() as server:
        site.wait_followed(server)
        server.updates.pause()
        site.send(KEYS, 1)
        site.send(KEYS[:50], 2)
        server.updates.seek(site.model, "items", offset=1, partition=0)
        server.updates.resume()
        wait_for(lambda: site.stream(server).rows == 50, PATIENCE_S, what="rows")
        assert versions(site, server) == {2, -1}
    with site.server() as server:
        assert server.updates.catch_up(PATIENCE_S)
        assert versions(site, server) == {2, -1}


def test_seek_by_time_begins_with_the_first_message_since(new_site: NewSite) -> None:
    site = new_site(partitions=1)
    with site.server() as server:
        site.send(KEYS, 1)
        site.wait_equal(server)
        since_s = time()
        wait_for(lambda: time() > since_s + 0.002, what="another millisecond")
        site.send(KEYS, 2)
        site.wait_equal(server)
        server.updates.seek(site.model, "items", time_s=since_s + 0.002)
        wait_for(lambda: site.stream(server).rows == 300, PATIENCE_S, what="rows")
        site.wait_equal(server)


def test_seek_refuses_what_is_not_there(new_site: NewSite) -> None:
    site = new_site(partitions=2)
    with site.server() as server:
        with pytest.raises(UpdateSourceError, match=r"items\[2\] is not followed"):
            server.updates.seek(site.model, "items", offset=0, partition=2)
        with pytest.raises(ValueError, match="at least 0"):
            server.updates.seek(site.model, "items", offset=-1)
        with pytest.raises(ValueError, match="at least 0"):
            server.updates.seek(site.model, "items", time_s=-2.0)
        with pytest.raises(TypeError, match="either offset or time_s"):
            server.updates.seek(site.model, "items")
        with pytest.raises(TypeError, match="a model and a table"):
            server.updates.pause(site.model)
        with pytest.raises(UnknownTableError):
            server.updates.pause(site.model, "nothing")
        site.send(KEYS, 1)
        site.wait_equal(server)


def test_seek_beyond_the_end_is_reported_and_begins_anew(
    new_site: NewSite, caplog: pytest.LogCaptureFixture
) -> None:
    site = new_site(partitions=1)
    with site.server() as server:
        site.send(KEYS, 1)
        site.wait_equal(server)
        server.updates.seek(site.model, "items", offset=1000)
        wait_for(lambda: site.stream(server).resets == 1, PATIENCE_S, what="reset")
        wait_for(lambda: site.stream(server).rows == 200, PATIENCE_S, what="rows")
        assert "beyond the end" in caplog.text
        site.send(KEYS, 2)
        site.wait_equal(server)


def test_statistics_tell_how_far_the_stream_is(new_site: NewSite) -> None:
    site = new_site(partitions=1)
    begin_s = time()
    with site.server() as server:
        site.send(KEYS, 1)
        site.delete(KEYS[:10])
        site.wait_equal(server)
        assert server.updates.catch_up(PATIENCE_S)
        stats = server.updates.stats()
        assert stats.connected
        stream = stats.stream(site.model, "items")
        assert stream is not None
        assert (stream.messages, stream.rows, stream.deletes) == (2, 100, 10)
        wait_for(lambda: site.stream(server).lag == 0, PATIENCE_S, what="no lag")
        assert site.stream(server).partitions[0].end == 2
        assert 0 < stream.rows_per_s <= 110 / 5
        assert stream.staleness.count == 2
        assert 0 <= stream.staleness.max_ms <= (time() - begin_s) * 1e3
        assert stats.stream(site.model, "nothing") is None
        assert server.stats().updates is not None
        server.updates.pause()
        site.send(KEYS, 2)
        wait_for(lambda: site.stream(server).lag == 1, PATIENCE_S, what="lag")
    with site.server(source={"initial_offset": "latest"}) as server:
        site.wait_equal(server)  # the position is stored, so the latest is not meant


# confluent-kafka lets the second thread inside a consumer wait with the interpreter's
# lock, for which the first one waits: what is told must come from elsewhere.
def test_statistics_are_told_while_streams_are_read(new_site: NewSite) -> None:
    site = new_site()
    with site.server() as server:
        site.wait_followed(server)
        for version in range(1, 21):
            site.send(KEYS, version)
            for _ in range(20):
                server.stats()
        site.wait_equal(server)
        assert site.stream(server).rows == 20 * KEYS.size


def test_close_ends_the_thread_and_what_comes_later_is_refused(
    new_site: NewSite,
) -> None:
    site = new_site()
    site.send(KEYS, 0)
    before = set(threading.enumerate())
    with site.server() as server:
        site.send(KEYS, 1)
        site.wait_equal(server)
        updates = server.updates
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if thread.name.startswith("hps")]
    for call in (updates.pause, updates.resume, updates.catch_up):
        with pytest.raises(ClosedError):
            call()
    with pytest.raises(ClosedError):
        updates.seek(site.model, "items", offset=0)
    assert updates.stats().stream(site.model, "items") is not None
    server.close()


def test_close_while_much_is_applied_loses_nothing(new_site: NewSite) -> None:
    site = new_site()
    keys = np.arange(10_000)
    for version in range(1, 11):
        site.send(keys, version)
    rows = 0
    for _ in range(5):
        with site.server(source={"burst_rows": 0}) as server:
            wait_for(lambda: site.stream(server).rows > 0, PATIENCE_S, what="rows")
        rows += site.stream(server).rows
    with site.server() as server:
        site.wait_equal(server)
        assert server.updates.catch_up(PATIENCE_S)
    assert rows + site.stream(server).rows == 100_000  # each of them once


def test_a_thread_that_waits_for_the_stream_is_freed_by_close(
    new_site: NewSite,
) -> None:
    site = new_site()
    server = site.server()
    site.wait_followed(server)
    server.updates.pause()
    site.send(KEYS, 1)
    caught: list[bool] = []
    waiter = threading.Thread(target=lambda: caught.append(server.updates.catch_up(60)))
    waiter.start()
    wait_for(lambda: site.parts(server)[0].end, PATIENCE_S, what="question for the end")
    server.close()
    waiter.join(PATIENCE_S)
    assert caught == [False]


def test_a_server_without_a_source_says_so(new_site: NewSite) -> None:
    site = new_site()
    with site.server(source={"type": "null"}) as server:
        assert server.stats().updates is None
        with pytest.raises(ConfigError, match="no stream of updates is configured"):
            _ = server.updates
