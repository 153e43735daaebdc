"""An embedding inference parameter server: ps.json in, rows out.

Names are imported when they are first used, so that ``import hps_numba`` is quick and
needs neither a compiler nor a database.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hps_numba._version import __version__

if TYPE_CHECKING:
    from hps_numba.config import (
        DatabaseOverflowPolicy_t,
        DatabaseType_t,
        EmbeddingCacheType_t,
        InferenceParams,
        ParameterServerConfig,
        PersistentDatabaseParams,
        UpdateSourceParams,
        UpdateSourceType_t,
        VolatileDatabaseParams,
    )
    from hps_numba.errors import (
        ClosedError,
        ConfigError,
        HPSError,
        ModelFileError,
        TierError,
        TierUnavailableError,
        UnknownTableError,
        UpdateError,
        UpdateSourceError,
    )
    from hps_numba.runtime.estimate import estimate
    from hps_numba.runtime.hps import HPS
    from hps_numba.runtime.session import LookupSession
    from hps_numba.runtime.updates.producer import UpdateProducer
    from hps_numba.runtime.updates.steps import touched_rows

_HOMES = {
    "HPS": "hps_numba.runtime.hps",
    "LookupSession": "hps_numba.runtime.session",
    "estimate": "hps_numba.runtime.estimate",
    "UpdateProducer": "hps_numba.runtime.updates.producer",
    "touched_rows": "hps_numba.runtime.updates.steps",
    **dict.fromkeys(
        (
            "ParameterServerConfig",
            "InferenceParams",
            "VolatileDatabaseParams",
            "PersistentDatabaseParams",
            "UpdateSourceParams",
            "DatabaseType_t",
            "DatabaseOverflowPolicy_t",
            "UpdateSourceType_t",
            "EmbeddingCacheType_t",
        ),
        "hps_numba.config",
    ),
    **dict.fromkeys(
        (
            "HPSError",
            "ConfigError",
            "UnknownTableError",
            "ModelFileError",
            "UpdateError",
            "UpdateSourceError",
            "ClosedError",
            "TierError",
            "TierUnavailableError",
        ),
        "hps_numba.errors",
    ),
}

__all__ = [
    # Serving
    "HPS",
    "LookupSession",
    "estimate",
    # Publishing updates
    "UpdateProducer",
    "touched_rows",
    # Configuration, with HugeCTR's names
    "ParameterServerConfig",
    "InferenceParams",
    "VolatileDatabaseParams",
    "PersistentDatabaseParams",
    "UpdateSourceParams",
    "DatabaseType_t",
    "DatabaseOverflowPolicy_t",
    "UpdateSourceType_t",
    "EmbeddingCacheType_t",
    # Errors
    "HPSError",
    "ConfigError",
    "UnknownTableError",
    "ModelFileError",
    "UpdateError",
    "UpdateSourceError",
    "ClosedError",
    "TierError",
    "TierUnavailableError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
