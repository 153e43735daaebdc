"""From what a user wrote to what the models validate."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hps_numba.config.fields import Kind, kinds, mark
from hps_numba.config.findings import Findings, Path
from hps_numba.errors import ConfigError

if TYPE_CHECKING:
    from hps_numba.config.base import ConfigModel

QUOTED = "is written as text; write it without quotes"
_INTEGER = re.compile(r"[+-]?[0-9]{1,40}")
_BOOLEANS = {"true": True, "false": False}
_OLD_BLOCKS = {"cpu_memory_db": "volatile_db", "distributed_db": "volatile_db"}


def read_json(path: str | os.PathLike[str], *, strict: bool) -> Any:
    """Return the content of a JSON file.

    Raises
    ------
    ConfigError
        If the file cannot be read, is not JSON, or, when strict, repeats a key.
    """
    source = os.fspath(path)
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{source}: cannot be read: {exc}") from exc
    findings = Findings(source, from_json=True, strict=strict)
    content = _parsed(text, findings)
    findings.log_notes()
    findings.raise_problems()
    return content


def _parsed(text: str, findings: Findings) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        for key in values:
            if sum(name == key for name, _ in pairs) > 1:
                findings.refuse_or_note((key,), "is given twice in one object")
        return values

    def constant(name: str) -> Any:
        raise ConfigError(f"{findings.source}: {name} is not allowed in JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except json.JSONDecodeError as exc:
        where = f"line {exc.lineno} column {exc.colno}"
        raise ConfigError(
            f"{findings.source}: not valid JSON at {where}: {exc.msg}"
        ) from None
    except RecursionError:
        raise ConfigError(f"{findings.source}: nested too deeply") from None
    except ConfigError:
        raise
    except ValueError as exc:  # an integer of thousands of digits
        raise ConfigError(f"{findings.source}: {exc}") from None


def clean(
    model: type[ConfigModel], data: Mapping[str, Any], findings: Findings, path: Path
) -> dict[str, Any]:
    """Return the values of ``data`` by field name, ready for strict validation.

    Accepts both spellings of a key, drops obsolete keys, and reads quoted numbers;
    everything else that is odd stays as it is, for the validation to refuse.
    """
    values: dict[str, Any] = {}
    known = model.spellings()
    for key, value in data.items():
        name = known.get(key)
        where = (*path, key if name is None else name)
        if name is None:
            _add_unknown(model, key, findings, where)
        elif name in values:
            findings.problem(where, f'is also given as "{findings.written[where]}"')
        else:
            findings.written[where] = key
            values[name] = _tidy(kinds(model)[name], value, findings, where)
            _note_idle(model, name, values[name], findings, where)
    model.complete(values, findings, path)
    _name_missing(model, values, findings, path)
    return values


def _name_missing(
    model: type[ConfigModel], values: dict[str, Any], findings: Findings, path: Path
) -> None:
    """Let messages call keys that were not given as the source would spell them."""
    for name, field in model.model_fields.items():
        if findings.from_json and name not in values:
            findings.written.setdefault((*path, name), field.alias or name)


def _add_unknown(
    model: type[ConfigModel], key: str, findings: Findings, where: Path
) -> None:
    if key in model.ignored:
        return
    if key in model.obsolete:
        findings.note(where, f"obsolete, and ignored: {model.obsolete[key]}")
        return
    near = difflib.get_close_matches(str(key), model.spellings(), n=1, cutoff=0.5)
    guess = _OLD_BLOCKS.get(key) or (near[0] if near else None)
    findings.refuse_or_note(
        where, "unknown key" + (f'; did you mean "{guess}"?' if guess else "")
    )


def _note_idle(
    model: type[ConfigModel], name: str, value: Any, findings: Findings, where: Path
) -> None:
    field = model.model_fields[name]
    reason = mark(field, "x-no-effect")
    if reason is not None and value != field.default:
        findings.note(where, f"has no effect: {reason}")


def _tidy(kind: Kind, value: Any, findings: Findings, where: Path) -> Any:
    if kind.many:
        if not isinstance(value, (list, tuple)):
            return value
        one = kind.one()
        return tuple(_tidy(one, v, findings, (*where, i)) for i, v in enumerate(value))
    if kind.nested is not None:
        return _tidy_object(kind.nested, value, findings, where)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str) and kind.base in (bool, int, float):
        return _unquoted(kind, value, findings, where)
    if kind.base is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind.base is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def _tidy_object(model: Any, value: Any, findings: Findings, where: Path) -> Any:
    if isinstance(value, Mapping):
        return clean(model, value, findings, where)
    return value


def _unquoted(kind: Kind, text: str, findings: Findings, where: Path) -> Any:
    value: Any = None
    if kind.base is bool:
        value = _BOOLEANS.get(text.strip().lower())
    elif kind.base is int and _INTEGER.fullmatch(text.strip()):
        value = int(text)
    elif kind.base is float:
        value = _number(text)
    if value is None:
        return text
    findings.note(where, QUOTED)
    return value


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
