"""The reference that is made from the models: JSON schema and Markdown tables."""

from __future__ import annotations

import json
import re
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from hps_numba.config.enums import Spellings
from hps_numba.config.fields import MAX_SIZE, Kind, kinds, mark
from hps_numba.config.kafka import KafkaSettings
from hps_numba.config.server import ParameterServerConfig

SCHEMA_FILE = "ps.schema.json"
TABLES_FILE = "configuration.md"
_MARKER = re.compile(r"(<!-- keys of (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def schema_text() -> str:
    """Return the JSON schema as it is kept in the documentation."""
    schema = ParameterServerConfig.model_json_schema(by_alias=True)
    return json.dumps(schema, indent=2) + "\n"


def with_tables(page: str) -> str:
    """Return a page with the tables between its markers brought up to date."""
    blocks = {"top": ParameterServerConfig} | {
        name: kind.nested
        for name, kind in kinds(ParameterServerConfig).items()
        if kind.nested is not None
    }

    def table(match: re.Match[str]) -> str:
        model = blocks[match[2]]
        assert model is not None
        return f"{match[1]}{_table(model)}{match[3]}"

    return _MARKER.sub(table, page)


def write(docs: Path) -> None:
    """Write the schema, and the tables of the configuration page."""
    (docs / SCHEMA_FILE).write_text(schema_text())
    page = docs / TABLES_FILE
    page.write_text(with_tables(page.read_text()))


def _table(model: type[BaseModel]) -> str:
    rows = ["| key | takes | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        kind = kinds(model)[name]
        if kind.nested is not None:
            continue
        key = f"`{field.alias or name}`"
        if field.alias:
            key += f" (Python: `{name}`)"
        if mark(field, "x-own"):
            key += " **new**"
        meaning = (field.description or "").replace("|", "\\|").replace("<", "&lt;")
        rows.append(f"| {key} | {_takes(kind)} | {_default(field)} | {meaning} |")
    for key, reason in getattr(model, "obsolete", {}).items():
        rows.append(f"| `{key}` | anything | | Obsolete, ignored: {reason}. |")
    return "\n".join(rows) + "\n"


def _takes(kind: Kind) -> str:
    for limit in kind.limits:
        if isinstance(limit, Spellings):
            names = ", ".join(f"`{member.value}`" for member in limit.by_member)
            return f"a list of {names}" if kind.many else names
    return kind.expected().replace("|", "\\|").replace("; each entry is", ", each")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    shown = mark(field, "x-default")
    return f"`{shown or _plain(field.get_default())}`"


def _plain(value: Any) -> str:
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, KafkaSettings):
        value = dict(value)
    return "2^64-1" if value == MAX_SIZE else json.dumps(value).replace("|", "\\|")
