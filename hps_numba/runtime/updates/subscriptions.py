"""Which topics are followed, by which tables, and into which tiers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from re import Pattern

from hps_numba.config import ParameterServerConfig
from hps_numba.config.filters import topic_pattern
from hps_numba.errors import ConfigError
from hps_numba.runtime.session import ServedModel
from hps_numba.runtime.stores import Stores
from hps_numba.runtime.updates.frames import KeyBytes
from hps_numba.runtime.updates.partition import Following
from hps_numba.tiers.base import Tier

logger = logging.getLogger(__name__)

Served = Callable[[], Iterable[ServedModel]]


@dataclass(frozen=True)
class Followed:
    """What is followed of some topics, by topic, and topics that no table has."""

    tables: Mapping[str, Following]
    unknown: tuple[str, ...]


class Subscriptions:
    """Finds the tables of topics. Used by one thread.

    Parameters
    ----------
    config
        The server's configuration.
    stores
        The tiers.
    served
        Returns the models that are served now.

    Raises
    ------
    ConfigError
        If a database follows that cannot be written, or none does.
    """

    def __init__(
        self, config: ParameterServerConfig, stores: Stores, served: Served
    ) -> None:
        self._served = served
        self._key_bytes: KeyBytes = 8 if config.supportlonglong else 4
        volatile, persistent = config.volatile_db, config.persistent_db
        self._tiers: list[tuple[Tier, list[Pattern[str]]]] = [
            (tier, [topic_pattern(f) for f in filters])
            for tier, filters in (
                (stores.volatile, volatile.update_filters),
                (stores.persistent, persistent.update_filters),
            )
            if tier is not None and filters
        ]
        if stores.persistent is not None and stores.persistent.read_only:
            if persistent.update_filters:
                raise ConfigError(
                    "persistent_db.read_only is true, so it cannot follow "
                    "update_source; set persistent_db.update_filters to []"
                )
            logger.warning(
                "persistent_db is read-only: rows that update_source brings live in "
                "the volatile database alone, and old ones return when it evicts them"
            )
        if not self._tiers:
            raise ConfigError(
                "update_source: update_filters of both databases are empty; remove "
                "update_source, or give one of them a filter"
            )
        self._known: dict[str, Following] = {}

    def of(self, topics: Collection[str]) -> Followed:
        """Return who follows which of the topics now.

        A table keeps its ``Following`` as long as it is served.
        """
        tables = {t.spec.tag: (t, m.gate) for m in self._served() for t in m.tables}
        # Also of topics that are not there now: they may come back.
        self._known = {
            topic: known
            for topic, known in self._known.items()
            if topic in tables and known.table is tables[topic][0]
        }
        followed: dict[str, Following] = {}
        unknown: list[str] = []
        for topic in sorted(topics):
            into = tuple(
                tier
                for tier, patterns in self._tiers
                if any(pattern.match(topic) for pattern in patterns)
            )
            if into and topic not in tables:
                unknown.append(topic)
            elif into:
                if topic not in self._known:
                    following = Following(*tables[topic], into, self._key_bytes)
                    self._known[topic] = following
                followed[topic] = self._known[topic]
        return Followed(followed, tuple(unknown))
