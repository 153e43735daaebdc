"""Named choices of the configuration, and every way that ps.json may spell them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from enum import Enum
from types import SimpleNamespace
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from hps_numba.types import FailureMode, OverflowPolicy, RowDtype


class DatabaseType(str, Enum):
    """Kind of a volatile or persistent database."""

    DISABLED = "disabled"
    HASH_MAP = "hash_map"
    PARALLEL_HASH_MAP = "parallel_hash_map"
    MULTI_PROCESS_HASH_MAP = "multi_process_hash_map"
    REDIS_CLUSTER = "redis_cluster"
    ROCKS_DB = "rocks_db"


class UpdateSourceType(str, Enum):
    """Kind of the stream that brings new rows."""

    NULL = "null"
    KAFKA_MESSAGE_QUEUE = "kafka_message_queue"


class InitialOffset(str, Enum):
    """Where a stream begins that no database has read of."""

    EARLIEST = "earliest"
    LATEST = "latest"


class OffsetReset(str, Enum):
    """Where a stream goes on when what comes next is not there any more."""

    EARLIEST = "earliest"
    LATEST = "latest"
    STOP = "stop"


class EmbeddingCacheType(str, Enum):
    """Kind of the GPU embedding cache."""

    DYNAMIC = "dynamic"
    STATIC = "static"
    UVM = "uvm"
    STOCHASTIC = "stochastic"


class GpuCachePolicy(str, Enum):
    """Which row of a full set of the GPU cache makes room for another."""

    LRU = "lru"
    LFU = "lfu"


class RedisLayout(str, Enum):
    """How rows are laid out in Redis."""

    STRINGS = "strings"
    HASHES = "hashes"


class DuplicateKeys(str, Enum):
    """What a key that a model directory holds twice means."""

    LAST_WINS = "last_wins"
    REFUSE = "refuse"


class NonFinite(str, Enum):
    """What happens to rows that hold NaN or an infinity."""

    ALLOW = "allow"
    REFUSE = "refuse"


class Spellings:
    """Validate a choice that has several spellings; for ``typing.Annotated``.

    Parameters
    ----------
    *members
        The allowed members. Each is accepted as itself and as its value, in any case.
    others
        Further spellings of some members.
    """

    def __init__(
        self, *members: Enum, others: Mapping[Any, tuple[str, ...]] | None = None
    ) -> None:
        extra = others or {}
        self.by_member = {m: (str(m.value), *extra.get(m, ())) for m in members}
        self._by_text = {t: m for m, texts in self.by_member.items() for t in texts}

    def find(self, value: object) -> Enum | None:
        """Return the member that a value means, or None."""
        if isinstance(value, Enum):
            return value if value in self.by_member else None
        return self._by_text.get(value.lower()) if isinstance(value, str) else None

    def parse(self, value: object) -> Enum:
        """Return the member that a value means, or raise ``ValueError``."""
        member = self.find(value)
        if member is None:
            raise ValueError(f"is not {self.expected()}{self._hint(value)}")
        return member

    def expected(self) -> str:
        """Return the allowed spellings, for a message."""
        return "one of " + ", ".join(f'"{text}"' for text in self._by_text)

    def _hint(self, value: object) -> str:
        near = difflib.get_close_matches(str(value).lower(), self._by_text, n=1)
        return f'; did you mean "{near[0]}"?' if near else ""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.parse,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda member: member.value, when_used="json"
            ),
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "string", "enum": list(self._by_text)}


VOLATILE_TYPES = Spellings(
    DatabaseType.DISABLED,
    DatabaseType.HASH_MAP,
    DatabaseType.PARALLEL_HASH_MAP,
    DatabaseType.MULTI_PROCESS_HASH_MAP,
    DatabaseType.REDIS_CLUSTER,
    others={
        DatabaseType.DISABLED: ("disable", "none"),
        DatabaseType.HASH_MAP: ("hashmap", "hash", "map"),
        DatabaseType.PARALLEL_HASH_MAP: (
            "parallel_hashmap",
            "parallel_hash",
            "parallel_map",
        ),
        DatabaseType.MULTI_PROCESS_HASH_MAP: (
            "multi_process_hashmap",
            "multi_process_hash",
            "multi_process_map",
        ),
        DatabaseType.REDIS_CLUSTER: ("redis",),
    },
)
PERSISTENT_TYPES = Spellings(
    DatabaseType.DISABLED,
    DatabaseType.ROCKS_DB,
    others={
        DatabaseType.DISABLED: ("disable", "none"),
        DatabaseType.ROCKS_DB: ("rocksdb", "rocks"),
    },
)
UPDATE_SOURCE_TYPES = Spellings(
    UpdateSourceType.NULL,
    UpdateSourceType.KAFKA_MESSAGE_QUEUE,
    others={
        UpdateSourceType.NULL: ("none",),
        UpdateSourceType.KAFKA_MESSAGE_QUEUE: ("kafka_mq", "kafka"),
    },
)
INITIAL_OFFSETS = Spellings(*InitialOffset)
OFFSET_RESETS = Spellings(*OffsetReset)
OVERFLOW_POLICIES = Spellings(
    *OverflowPolicy,
    others={
        OverflowPolicy.EVICT_RANDOM: ("random",),
        OverflowPolicy.EVICT_LEAST_USED: ("least_used",),
        OverflowPolicy.EVICT_OLDEST: ("oldest",),
    },
)
CACHE_TYPES = Spellings(*EmbeddingCacheType)
GPU_CACHE_POLICIES = Spellings(*GpuCachePolicy)
ROW_DTYPES = Spellings(*RowDtype)
FAILURE_MODES = Spellings(*FailureMode)
REDIS_LAYOUTS = Spellings(*RedisLayout)
DUPLICATE_KEYS = Spellings(*DuplicateKeys)
NON_FINITE = Spellings(*NonFinite)


def _lower_case_names(kind: type[Enum]) -> SimpleNamespace:
    return SimpleNamespace(**{str(member.value): member for member in kind})


# The names of HugeCTR's Python module, so that its scripts need new imports only.
DatabaseType_t = _lower_case_names(DatabaseType)
DatabaseOverflowPolicy_t = _lower_case_names(OverflowPolicy)
UpdateSourceType_t = _lower_case_names(UpdateSourceType)
EmbeddingCacheType_t = SimpleNamespace(
    Dynamic=EmbeddingCacheType.DYNAMIC,
    Static=EmbeddingCacheType.STATIC,
    UVM=EmbeddingCacheType.UVM,
    stochastic=EmbeddingCacheType.STOCHASTIC,
)
