"""Settings of librdkafka in the configuration: passed through, secrets hidden."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, SecretStr
from pydantic_core import CoreSchema, core_schema

Setting = str | int | float
"""A value of librdkafka; ``bool`` is an ``int``."""

EXPECTED = "an object of librdkafka settings: strings, numbers, true or false"
_SECRETS = re.compile(r"password|secret|passphrase|key\.pem|oauthbearer\.config")
_IS_BROKERS = "is not set here; update_source.brokers names the brokers"
_IS_OURS = "is not to be set: which rows are applied, and how often, hangs on it"
_OWN = {
    "bootstrap.servers": _IS_BROKERS,
    "metadata.broker.list": _IS_BROKERS,
    "auto.offset.reset": "is not set here; see update_source.offset_reset",
    "topic.auto.offset.reset": "is not set here; see update_source.offset_reset",
    "enable.auto.commit": _IS_OURS,
    "auto.commit.enable": _IS_OURS,
    "enable.auto.offset.store": _IS_OURS,
    "enable.partition.eof": _IS_OURS,
    "default.topic.config": "is obsolete; set what it holds directly",
}


class KafkaSettings(Mapping[str, Any]):
    """Settings of librdkafka by name, immutable.

    Values that are secret are ``SecretStr``: no dump, message or log shows them.

    Parameters
    ----------
    values
        Strings, numbers and booleans by name. Secrets may be plain or ``SecretStr``.

    Raises
    ------
    ValueError
        If a value is something else, or the setting is one that delivery relies on.
    """

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        self._values = {
            name: _checked(name, value) for name, value in (values or {}).items()
        }

    def plain(self) -> dict[str, Setting]:
        """Return the settings with their secrets, for librdkafka."""
        return {
            name: value.get_secret_value() if isinstance(value, SecretStr) else value
            for name, value in self._values.items()
        }

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __repr__(self) -> str:
        return f"KafkaSettings({self._values!r})"

    @classmethod
    def _parse(cls, value: object) -> KafkaSettings:
        if isinstance(value, KafkaSettings):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"is not {EXPECTED}")
        return cls(value)

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._parse,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda settings: {
                    name: str(value) if isinstance(value, SecretStr) else value
                    for name, value in settings.items()
                },
                when_used="json",
            ),
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {
            "type": "object",
            "propertyNames": {"not": {"enum": sorted(_OWN)}},
            "additionalProperties": {"type": ["string", "number", "boolean"]},
        }


def _checked(name: object, value: object) -> Setting | SecretStr:
    if not isinstance(name, str):
        raise ValueError(f"is not {EXPECTED}")
    if name in _OWN:
        raise ValueError(f"has {name}, which {_OWN[name]}")
    if isinstance(value, SecretStr):
        return value
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"has {name}, which is not a string, a number, true or false")
    return SecretStr(str(value)) if _SECRETS.search(name) else value
