"""The update streams that a configuration asks for."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from hps_numba.config import (
    ParameterServerConfig,
    UpdateSourceParams,
    UpdateSourceType,
)
from hps_numba.errors import ConfigError
from hps_numba.runtime.session import ServedModel
from hps_numba.runtime.stores import Stores
from hps_numba.runtime.updates.dead_letters import DeadLetterFile, DeadLetters

if TYPE_CHECKING:
    from hps_numba.runtime.updates.control import TagOf, Updates


def open_updates(
    config: ParameterServerConfig,
    stores: Stores,
    served: Callable[[], Iterable[ServedModel]],
    tag_of: TagOf,
) -> Updates | None:
    """Return the update streams of a server, to be started; None without a source.

    Raises
    ------
    ConfigError
        If a database cannot follow, confluent-kafka is not installed, or its settings
        are refused.
    """
    params = config.update_source
    if params.type is UpdateSourceType.NULL:
        return None
    try:
        from hps_numba.runtime.updates.consumer import UpdateConsumer
        from hps_numba.runtime.updates.control import Updates
        from hps_numba.runtime.updates.source import KafkaSource
        from hps_numba.runtime.updates.subscriptions import Subscriptions
    except ModuleNotFoundError as exc:
        if exc.name != "confluent_kafka":
            raise
        raise ConfigError(
            "update_source.type: kafka_message_queue needs confluent-kafka; "
            'pip install "hps-numba[kafka]"'
        ) from exc
    subscriptions = Subscriptions(config, stores, served)
    source = KafkaSource(params, group=_group(stores))
    consumer = UpdateConsumer(params, source, subscriptions, _dead_letters(params))
    return Updates(consumer, source, tag_of)


def _group(stores: Stores) -> str:
    """Return the group whose offsets tell how far this server is, as HPS names it."""
    name = "persistent" if stores.persistent is not None else "volatile"
    return f"hps.{name}.{socket.gethostname()}"


def _dead_letters(params: UpdateSourceParams) -> list[DeadLetters]:
    keepers: list[DeadLetters] = []
    if params.dead_letter_file is not None:
        keepers.append(DeadLetterFile(params.dead_letter_file))
    if params.dead_letter_topic is not None:
        from hps_numba.runtime.updates.dead_letter_topic import DeadLetterTopic

        keepers.append(DeadLetterTopic(params))
    return keepers
