from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from hps_numba.config import UpdateSourceParams
from hps_numba.runtime.updates.source import KafkaSource
from tests.runtime.updates.servers import NewSite, Site
from tests.support.kafka_broker import KafkaBroker, MockCluster

_NUMBERS = count()

NewSource = Callable[..., KafkaSource]


@pytest.fixture(scope="session")
def broker() -> Iterator[KafkaBroker]:
    with KafkaBroker() as running:
        yield running


@pytest.fixture
def own_broker() -> Iterator[KafkaBroker]:
    """A broker that a test may stop."""
    with KafkaBroker(own=True) as running:
        yield running


@pytest.fixture
def mock() -> Iterator[str]:
    """The address of librdkafka's own brokers, which are right about offsets."""
    with MockCluster() as address:
        yield address


@pytest.fixture
def topic() -> str:
    """A topic that no other test has."""
    return f"hps_et.model{next(_NUMBERS)}.table"


@pytest.fixture
def new_source() -> Iterator[NewSource]:
    """Make sources, closed with the test: ``new_source(address, **parameters)``."""
    made: list[KafkaSource] = []

    def make(address: str, **parameters: Any) -> KafkaSource:
        params = UpdateSourceParams(type="kafka", brokers=address, **parameters)
        made.append(KafkaSource(params, group="test"))
        return made[-1]

    yield make
    for source in made:
        source.close()


@pytest.fixture
def new_site(tmp_path: Path, broker: KafkaBroker) -> Iterator[NewSite]:
    """Make models with topics of their own: ``new_site(**parameters of Site)``."""
    made: list[Site] = []

    def make(**parameters: Any) -> Site:
        made.append(Site(tmp_path, parameters.pop("broker", broker), **parameters))
        return made[-1]

    yield make
    for site in made:
        site.close()
