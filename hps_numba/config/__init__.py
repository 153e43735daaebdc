"""The configuration: all of ps.json, from a file or from Python.

Names and spellings are HugeCTR's. ``python -m hps_numba.config`` prints a JSON schema.
"""

from hps_numba.config.databases import (
    PersistentDatabaseParams,
    UpdateSourceParams,
    VolatileDatabaseParams,
)
from hps_numba.config.enums import (
    DatabaseOverflowPolicy_t,
    DatabaseType,
    DatabaseType_t,
    DuplicateKeys,
    EmbeddingCacheType,
    EmbeddingCacheType_t,
    GpuCachePolicy,
    NonFinite,
    RedisLayout,
    UpdateSourceType,
    UpdateSourceType_t,
)
from hps_numba.config.filters import topic_pattern
from hps_numba.config.models import InferenceParams
from hps_numba.config.server import ParameterServerConfig

__all__ = [
    "DatabaseOverflowPolicy_t",
    "DatabaseType",
    "DatabaseType_t",
    "DuplicateKeys",
    "EmbeddingCacheType",
    "EmbeddingCacheType_t",
    "GpuCachePolicy",
    "InferenceParams",
    "NonFinite",
    "ParameterServerConfig",
    "PersistentDatabaseParams",
    "RedisLayout",
    "UpdateSourceParams",
    "UpdateSourceType",
    "UpdateSourceType_t",
    "VolatileDatabaseParams",
    "topic_pattern",
]
