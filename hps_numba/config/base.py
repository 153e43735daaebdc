"""Base of all configuration objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema
from typing_extensions import Self

from hps_numba.config.fields import mark
from hps_numba.config.findings import Findings, Path
from hps_numba.config.reading import clean
from hps_numba.errors import ConfigError


class ConfigModel(BaseModel):
    """Immutable part of the configuration.

    Keyword arguments are HugeCTR's Python names or the spellings of ps.json, positional
    ones follow HugeCTR's order.

    Raises
    ------
    ConfigError
        If an argument is unknown, has a wrong type or is out of range; the message
        names them all.
    """

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        populate_by_name=True,
        protected_namespaces=(),
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )

    obsolete: ClassVar[Mapping[str, str]] = {}
    """Keys of older HugeCTR releases, each with the reason why it is ignored."""

    ignored: ClassVar[frozenset[str]] = frozenset()
    """Keys that mean nothing here and need no remark."""

    def __init__(self, /, *args: Any, **data: Any) -> None:
        findings = Findings(type(self).__name__, from_json=False)
        given = self._arranged(_with_positional(type(self), args, data), findings)
        values = clean(type(self), given, findings, ())
        try:
            super().__init__(**values)
        except ValidationError as exc:
            findings.add_invalid(exc, type(self))
        findings.log_notes()
        findings.raise_problems()

    # Marks this as pydantic's own kind of __init__: objects inside of objects are then
    # validated in place, which keeps their paths, instead of through this method.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        raise ConfigError(
            f"{type(self).__name__}.{name} cannot be assigned: configurations are "
            f"immutable; pass {name}= to the constructor or to replace()"
        )

    @classmethod
    def read(cls, data: Mapping[str, Any], findings: Findings) -> Self:
        """Return the object that some JSON content describes; raise ``ConfigError``."""
        values = clean(cls, data, findings, ())
        result = None
        try:
            result = cls.model_validate(values)
        except ValidationError as exc:
            findings.add_invalid(exc, cls)
        findings.log_notes()
        findings.raise_problems()
        assert result is not None  # without it there is a problem
        return result

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some values changed, validated like a new object."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**given, **changes})

    @classmethod
    def spellings(cls) -> dict[str, str]:
        """Return the field name of every accepted key."""
        fields = cls.model_fields
        aliases = {f.alias: name for name, f in fields.items() if f.alias}
        return {**{name: name for name in fields}, **aliases}

    @classmethod
    def argument_order(cls) -> tuple[str, ...]:
        """Return the names of positional arguments: HugeCTR's, in its order."""
        fields = cls.model_fields.items()
        return tuple(name for name, field in fields if not mark(field, "x-own"))

    @classmethod
    def complete(cls, values: dict[str, Any], findings: Findings, path: Path) -> None:
        """Fill in, by field name, what the other values imply.

        An empty ``path`` with ``findings.from_json`` unset is a Python constructor;
        everything else is an object of ps.json.
        """

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Add the keys that are no fields: files that load fit the schema."""
        reference = handler(schema)
        properties = handler.resolve_ref_schema(reference)["properties"]
        for key, reason in cls.obsolete.items():
            text = f"Obsolete: {reason}."
            properties[key] = {"deprecated": True, "description": text}
        properties.update({key: {} for key in sorted(cls.ignored)})
        return reference

    @classmethod
    def _arranged(cls, data: dict[str, Any], findings: Findings) -> dict[str, Any]:
        """Turn arguments that only Python has into fields."""
        return data


def _with_positional(
    model: type[ConfigModel], args: tuple[Any, ...], data: dict[str, Any]
) -> dict[str, Any]:
    order = model.argument_order()
    if len(args) > len(order):
        raise ConfigError(
            f"{model.__name__} takes at most {len(order)} positional arguments, "
            f"but {len(args)} were given"
        )
    positional = dict(zip(order, args, strict=False))
    twice = sorted(set(positional) & set(data))
    if twice:
        raise ConfigError(f"{model.__name__}: {twice[0]} is given twice")
    return {**positional, **data}
