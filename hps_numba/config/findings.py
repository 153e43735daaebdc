"""What is wrong or remarkable about one configuration, and how it is told."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError

from hps_numba.config.fields import Kind, kinds
from hps_numba.errors import ConfigError

logger = logging.getLogger(__name__)

Path = tuple[str | int, ...]
"""Way to a value: field names and list positions."""

_MAX_SHOWN = 60  # characters of a value


@dataclass(frozen=True)
class Problem:
    """Something that makes the configuration unusable."""

    path: Path
    text: str


class InconsistentError(ValueError):
    """Values that are fine alone contradict each other; raised inside validators."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(problem.text for problem in problems))
        self.problems = tuple(problems)


@dataclass
class Findings:
    """Collector of one reading: problems raise at the end, notes are logged.

    Parameters
    ----------
    source
        What is being read, for messages: a file name or a class name.
    from_json
        Whether keys that were not given are called by their ps.json spelling.
    strict
        Whether an unknown key is a problem; else it is noted.
    """

    source: str
    from_json: bool
    strict: bool = True
    problems: list[Problem] = field(default_factory=list)
    written: dict[Path, str] = field(default_factory=dict)
    _notes: dict[tuple[int, str], list[Path]] = field(default_factory=dict)

    def problem(self, path: Path, text: str) -> None:
        """Add something that makes the configuration unusable."""
        self.problems.append(Problem(path, text))

    def note(self, path: Path, text: str, *, level: int = logging.WARNING) -> None:
        """Add something to log; equal texts become one line with all their paths."""
        self._notes.setdefault((level, text), []).append(path)

    def refuse_or_note(self, path: Path, text: str) -> None:
        """Add a problem, or a note if the reading is not strict."""
        (self.problem if self.strict else self.note)(path, text)

    def add_invalid(self, exc: ValidationError, model: type[BaseModel]) -> None:
        """Add every problem that pydantic found in a value of ``model``."""
        for error in exc.errors(include_url=False):
            self.problems.extend(_translated(error, model))

    def log_notes(self) -> None:
        """Log the notes and forget them."""
        for (level, text), paths in self._notes.items():
            shown = ", ".join(self.shown(path) for path in paths)
            logger.log(level, "%s: %s: %s", self.source, shown, text)
        self._notes.clear()

    def raise_problems(self) -> None:
        """Raise ``ConfigError`` with all problems, one a line, if there are any."""
        if not self.problems:
            return
        lines = [f"{self.shown(p.path)}: {p.text}".lstrip(": ") for p in self.problems]
        unique = list(dict.fromkeys(lines))
        if len(unique) == 1:
            raise ConfigError(f"{self.source}: {unique[0]}")
        body = "".join(f"\n  {line}" for line in unique)
        raise ConfigError(f"{self.source}: {len(unique)} problems{body}")

    def shown(self, path: Path) -> str:
        """Return a path as the user wrote it, like ``models[0].gpucacheper``."""
        text = ""
        for end, part in enumerate(path, start=1):
            if isinstance(part, int):
                text += f"[{part}]"
                continue
            name = self.written.get(path[:end], part)
            text += f".{name}" if text else name
        return text


def shown_value(value: object, kind: Kind | None = None) -> str:
    """Return a value for a message: short, and never a secret."""
    if kind is not None and kind.secret:
        return "the value"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, (list, tuple)):
        return "a list"
    if value is None or isinstance(value, (bool, int, float, str)):
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
    return f"a {type(value).__name__}"


def _translated(error: Any, model: type[BaseModel]) -> Iterator[Problem]:
    path, kind = _at(model, error["loc"])
    value = shown_value(error["input"], kind)
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, InconsistentError):
        for problem in cause.problems:
            yield Problem((*path, *problem.path), problem.text)
    elif error["type"] == "missing":
        yield Problem(path, f"missing; needs {kind.expected() if kind else 'a value'}")
    elif cause is not None:
        yield Problem(path, f"{value} {cause}")
    elif kind is not None:
        yield Problem(path, f"{value} is not {kind.expected()}")
    else:
        yield Problem(path, error["msg"])


def _at(model: type[BaseModel], place: Path) -> tuple[Path, Kind | None]:
    """Return the path in field names, and the kind of what is there."""
    path: Path = ()
    kind = None
    for part in place:
        if isinstance(part, int):
            kind = kind.one() if kind else None
        else:
            owner = model if kind is None else kind.nested
            part = _field_name(owner, part)
            kind = kinds(owner).get(part) if owner else None
        path = (*path, part)
    return path, kind


def _field_name(model: type[BaseModel] | None, key: str) -> str:
    """Return the field of a key; pydantic calls missing ones by their alias."""
    fields = model.model_fields if model else {}
    return next((name for name, f in fields.items() if f.alias == key), key)
