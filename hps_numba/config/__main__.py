"""Print the JSON schema of ps.json."""

from __future__ import annotations

import json
import sys

from hps_numba.config.server import ParameterServerConfig


def schema_text() -> str:
    """Return the schema as it is kept in docs/ps.schema.json."""
    schema = ParameterServerConfig.model_json_schema(by_alias=True)
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    sys.stdout.write(schema_text())
