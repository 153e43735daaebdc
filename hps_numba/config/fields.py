"""Field types of the configuration, and what they tell about themselves."""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, Field, SecretStr
from pydantic.fields import FieldInfo

from hps_numba.config.enums import Spellings
from hps_numba.config.filters import topic_pattern
from hps_numba.config.kafka import EXPECTED as KAFKA_EXPECTED
from hps_numba.config.kafka import KafkaSettings

MAX_SIZE = 2**64 - 1
NAME_PATTERN = r"^[a-zA-Z0-9_\-]{1,120}$"
_FLOAT32_MAX = 3.4028234663852886e38


def _topic_filter(text: str) -> str:
    try:
        topic_pattern(text)
    except re.error as exc:
        raise ValueError(f"is not a regular expression: {exc}") from None
    return text


Size = Annotated[int, Field(ge=0, le=MAX_SIZE)]
Count = Annotated[int, Field(ge=1, le=MAX_SIZE)]
SmallCount = Annotated[int, Field(ge=1, le=65_536)]
Milliseconds = Annotated[int, Field(ge=1, le=86_400_000)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Text = Annotated[str, Field(min_length=1)]
TopicFilter = Annotated[str, AfterValidator(_topic_filter)]
RowValue = Annotated[float, Field(ge=-_FLOAT32_MAX, le=_FLOAT32_MAX)]


def own(default: Any, description: str) -> Any:
    """Declare a key that HugeCTR does not have."""
    return Field(default, description=description, json_schema_extra={"x-own": True})


def idle(default: Any, reason: str, *, alias: str | None = None) -> Any:
    """Declare a key that is accepted and changes nothing."""
    return Field(
        default,
        alias=alias,
        description=f"No effect: {reason}.",
        json_schema_extra={"x-no-effect": reason},
    )


def computed(make: Any, shown: str, description: str) -> Any:
    """Declare a key whose default depends on the machine."""
    return Field(
        default_factory=make,
        description=description,
        json_schema_extra={"x-default": shown},
    )


def mark(field: FieldInfo, name: str) -> Any:
    """Return what ``own``, ``idle`` or ``computed`` noted about a field, or None."""
    extra = field.json_schema_extra
    return extra.get(name) if isinstance(extra, dict) else None


@dataclass(frozen=True)
class Kind:
    """What a field takes: ``base``, or a list of it if ``many``."""

    base: Any
    many: bool = False
    optional: bool = False
    limits: tuple[Any, ...] = ()

    def one(self) -> Kind:
        """Return the kind of one entry of a list."""
        return Kind(self.base, limits=self.limits)

    @property
    def secret(self) -> bool:
        """Whether a value must never be shown."""
        return self.base in (SecretStr, KafkaSettings)

    @property
    def nested(self) -> type[BaseModel] | None:
        """The model of an object, if the field takes objects."""
        is_model = isinstance(self.base, type) and issubclass(self.base, BaseModel)
        return self.base if is_model else None

    def expected(self) -> str:
        """Return what is allowed, for a message."""
        text = f"a list; each entry is {self._one()}" if self.many else self._one()
        return f"{text}, or null" if self.optional else text

    def _one(self) -> str:
        for limit in self.limits:
            if isinstance(limit, Spellings):
                return limit.expected()
        nouns = {bool: "true or false", int: "an integer", float: "a number"}
        return nouns.get(self.base, self._text()) + _range(self.limits)

    def _text(self) -> str:
        if self.base is KafkaSettings:
            return KAFKA_EXPECTED
        if self.nested:
            return "an object"
        pattern = _limit(self.limits, "pattern")
        if pattern is not None:
            return f"a string that matches {pattern}"
        if _limit(self.limits, "min_length") is not None:
            return "a string that is not empty"
        return "a string"


@cache
def kinds(model: type[BaseModel]) -> dict[str, Kind]:
    """Return the kind of every field of a model, by field name."""
    return {
        name: _kind(field.annotation, tuple(_flat(field.metadata)))
        for name, field in model.model_fields.items()
    }


def _kind(annotation: Any, limits: tuple[Any, ...]) -> Kind:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(args[0], (*limits, *_flat(args[1:])))
    if origin in (Union, types.UnionType):
        inner = _kind(next(a for a in args if a is not type(None)), limits)
        return Kind(inner.base, inner.many, optional=True, limits=inner.limits)
    if origin is tuple:
        inner = _kind(args[0], limits)
        return Kind(inner.base, many=True, limits=inner.limits)
    return Kind(annotation, limits=limits)


def _flat(metadata: Iterable[Any]) -> Iterator[Any]:
    for entry in metadata:
        if isinstance(entry, FieldInfo):
            yield from _flat(entry.metadata)
        else:
            yield entry


def _limit(limits: Iterable[Any], name: str) -> Any:
    return next((v for m in limits if (v := getattr(m, name, None)) is not None), None)


def _range(limits: tuple[Any, ...]) -> str:
    low, above = _limit(limits, "ge"), _limit(limits, "gt")
    high = _limit(limits, "le")
    if low is not None and high is not None:
        return f" from {_bound(low)} to {_bound(high)}"
    if above is not None and high is not None:
        return f" above {_bound(above)} and at most {_bound(high)}"
    if low is not None:
        return f" of at least {_bound(low)}"
    return "" if above is None else f" above {_bound(above)}"


def _bound(value: float) -> str:
    if value == MAX_SIZE:
        return "2^64-1"
    return f"{value:g}" if isinstance(value, float) else str(value)
