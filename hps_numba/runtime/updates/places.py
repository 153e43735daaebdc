"""Where a stream partition goes on: what its tiers have, in what the stream has."""

from __future__ import annotations

import logging

from hps_numba.runtime.updates.partition import Following
from hps_numba.runtime.updates.source import Begin, KafkaSource
from hps_numba.tiers.base import LastingTier
from hps_numba.types import Position

logger = logging.getLogger(__name__)


def begin(following: Following, number: int, source: KafkaSource) -> Begin:
    """Read a partition from the first record on that one of its tiers lacks.

    A tier is moved only if the records that come next for it are not there: others may
    share it, and be further.

    Raises
    ------
    UpdateSourceError
        If no broker tells what there is.
    TierError
        If a tier cannot tell how far it is.
    """
    topic = following.topic
    places: list[Begin] = []
    for tier, stored in _stored(following, number):
        place = source.begin(topic, number, stored)
        if place.reset:
            following.counters.add(resets=1)
            where = f"table={topic} partition={number}"
            logger.error(
                "%s tier=%s: %s", where, tier.name if tier else "", place.reason
            )
        if place.position is None:
            source.unassign(topic, number)
            return place
        if tier is not None and place.reset:
            tier.seek(topic, {number: place.position})
        places.append(place)
    least = min(places, key=_position)
    position = _position(least)
    for tier in following.lasting:
        # Before anything is applied, or a tier that the first span did not reach would
        # take up the stream behind it.
        tier.begin_stream(topic, {number: position})
    following.tell_lower_positions()
    source.seek(topic, number, position.offset)
    return least


def _stored(
    following: Following, number: int
) -> list[tuple[LastingTier | None, Position | None]]:
    """Return what each tier has stored, the lowest first.

    Those above it that have nothing take up the stream wherever it begins.
    """
    topic = following.topic
    stored = [(t, t.positions(topic).get(number)) for t in following.lasting]
    if not stored:
        return [(None, following.reached.get(number))]
    return [*stored[:1], *(pair for pair in stored[1:] if pair[1] is not None)]


def _position(place: Begin) -> Position:
    assert place.position is not None
    return place.position
