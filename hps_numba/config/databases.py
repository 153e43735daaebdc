"""The blocks of ps.json that all models share: databases and the update source."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Annotated, Any, ClassVar

from pydantic import Field, SecretStr, model_validator
from typing_extensions import Self

from hps_numba.config.base import ConfigModel
from hps_numba.config.enums import (
    INITIAL_OFFSETS,
    OFFSET_RESETS,
    OVERFLOW_POLICIES,
    PERSISTENT_TYPES,
    REDIS_LAYOUTS,
    UPDATE_SOURCE_TYPES,
    VOLATILE_TYPES,
    DatabaseType,
    InitialOffset,
    OffsetReset,
    RedisLayout,
    UpdateSourceType,
)
from hps_numba.config.fields import (
    MAX_SIZE,
    Count,
    Milliseconds,
    Share,
    Size,
    SmallCount,
    Text,
    TopicFilter,
    computed,
    idle,
    own,
)
from hps_numba.config.findings import Findings, InconsistentError, Path, Problem
from hps_numba.config.kafka import KafkaSettings
from hps_numba.errors import ConfigError
from hps_numba.types import OverflowPolicy

_MAX_PARTITIONS = 16  # unless configured
_PASSWORDS = ("password", "password_env", "password_file")
_DEFAULT_FILTERS = ("^hps_.+$",)
_OLD_BATCH_KEYS = {
    "max_get_batch_size": "max_batch_size replaced it",
    "max_set_batch_size": "max_batch_size replaced it",
    "refresh_time_after_fetch": "evict_oldest always refreshes the time of use",
}


def _cores() -> int:
    return os.cpu_count() or 1


class VolatileDatabaseParams(ConfigModel):
    """``volatile_db``: rows in memory, of this process or of a Redis cluster."""

    obsolete: ClassVar[Mapping[str, str]] = {
        **_OLD_BATCH_KEYS,
        "algorithm": "there is one hash map",
    }

    type: Annotated[DatabaseType, VOLATILE_TYPES] = Field(
        DatabaseType.PARALLEL_HASH_MAP,
        description="Kind of database. An absent block means parallel_hash_map; one "
        "without type means disabled. hash_map and parallel_hash_map are the same.",
    )
    address: Text = Field(
        "127.0.0.1:7000", description="Redis nodes, host[:port], separated by commas."
    )
    user_name: str = Field("default", description="Redis ACL user.")
    password: SecretStr = Field(
        SecretStr(""), description="Redis password, in plain text.", repr=False
    )
    password_env: Text | None = own(
        None, "Environment variable that holds the Redis password."
    )
    password_file: Text | None = own(
        None, "File that holds the Redis password; a final line break is dropped."
    )
    num_partitions: SmallCount = computed(
        lambda: min(_MAX_PARTITIONS, _cores()),
        "min(16, cores); 16 for Redis",
        "Partitions per table. Part of Redis' and Kafka's layout: not to be changed "
        "once rows are stored there.",
    )
    allocation_rate: Size = idle(
        256 << 20, "host memory grows by segments that double in size"
    )
    max_bytes: Count | None = own(
        None,
        "Budget of host memory for all tables together; null for none. It is never "
        "exceeded: tables evict.",
    )
    shared_memory_size: Size = Field(
        16 << 30, description="Bytes of a multi_process_hash_map."
    )
    shared_memory_name: Text = Field(
        "hctr_mp_hash_map_database", description="Name of a multi_process_hash_map."
    )
    shared_memory_auto_remove: bool = Field(
        True, description="Remove a multi_process_hash_map with its last process."
    )
    num_node_connections: SmallCount = Field(
        5, description="Connections per Redis node; at most num_partitions."
    )
    max_batch_size: Count = Field(
        65_536,
        description="Most keys per request to a tier; a longer lookup goes in chunks.",
    )
    redis_layout: Annotated[RedisLayout, REDIS_LAYOUTS] = own(
        RedisLayout.STRINGS,
        "strings: a string key per row, read by MGET. hashes: HugeCTR's own layout.",
    )
    redis_timeout_ms: Milliseconds = own(
        1000,
        "How long a Redis node may take to answer before it counts as down, in ms.",
    )
    redis_connect_timeout_ms: Milliseconds = own(
        1000, "How long connecting to a Redis node may take, in ms."
    )
    redis_wait_replicas: Annotated[int, Field(ge=0, le=1000)] = own(
        0,
        "Replicas of each Redis node that must confirm an update before it is "
        "acknowledged. 0 waits for none: a replica that takes over may lack the last "
        "updates.",
    )
    enable_tls: bool = Field(False, description="Use TLS to reach Redis.")
    tls_ca_certificate: Text = Field(
        "cacertbundle.crt", description="File or directory of certificate authorities."
    )
    tls_client_certificate: Text = Field(
        "client_cert.pem",
        description="Client certificate for mutual TLS. None is shown if this is the "
        "default and no such file is there.",
    )
    tls_client_key: Text = Field(
        "client_key.pem", description="Client key for mutual TLS; as above."
    )
    tls_server_name_identification: str = Field(
        "redis.localhost",
        description="Server name that TLS asks for (SNI) and that the certificate must "
        "bear. Empty: the host that is connected to.",
    )
    overflow_margin: Count = Field(
        MAX_SIZE, description="Most rows per partition of a table."
    )
    overflow_policy: Annotated[OverflowPolicy, OVERFLOW_POLICIES] = Field(
        OverflowPolicy.EVICT_RANDOM,
        description="Which rows a full partition gives up: any, the least often used, "
        "or those not used for longest.",
    )
    overflow_resolution_target: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8, description="Share of the margin that an eviction leaves."
    )
    initialize_after_startup: bool = Field(
        True, description="Fill the database when a model is opened."
    )
    initial_cache_rate: Share = idle(1.0, "all rows are loaded that the budget holds")
    cache_missed_embeddings: bool = Field(
        False,
        description="Backfill rows that only the persistent database had, in the "
        "background. Default rows are never stored.",
    )
    update_filters: tuple[TopicFilter, ...] = Field(
        _DEFAULT_FILTERS,
        description="Regular expressions of the topics whose updates are stored here: "
        "whole topics, hps_et.<model>.<table>, or names of models.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Check what concerns several keys."""
        problems = []
        is_redis = self.type is DatabaseType.REDIS_CLUSTER
        if is_redis and self.num_partitions < self.num_node_connections:
            text = (
                f"{self.num_partitions} is less than num_node_connections "
                f"({self.num_node_connections}); Redis needs at least as many"
            )
            problems.append(Problem(("num_partitions",), text))
        sources = [name for name in _PASSWORDS if _is_set(getattr(self, name))]
        if len(sources) > 1:
            text = f"is given beside {sources[0]}; give one of them"
            problems.append(Problem((sources[1],), text))
        if problems:
            raise InconsistentError(problems)
        return self

    @classmethod
    def complete(cls, values: dict[str, Any], findings: Findings, path: Path) -> None:
        """Disable a block of ps.json without ``type``, as HugeCTR does.

        The partitions of Redis must not depend on the machine: servers share them.
        """
        if _lacks_type("type", values, findings, path):
            values["type"] = DatabaseType.DISABLED
        if VOLATILE_TYPES.find(values.get("type")) is DatabaseType.REDIS_CLUSTER:
            values.setdefault("num_partitions", _MAX_PARTITIONS)

    def client_certificate(self) -> tuple[str | None, str | None]:
        """Return the files of the client certificate and its key; None for none.

        Raises
        ------
        ConfigError
            If a file is not there, unless it is HugeCTR's default.
        """
        return (
            self._client_file("tls_client_certificate"),
            self._client_file("tls_client_key"),
        )

    def _client_file(self, name: str) -> str | None:
        path: str = getattr(self, name)
        if FilePath(path).is_file():
            return path
        if path != type(self).model_fields[name].default:
            raise ConfigError(f"volatile_db.{name}: {path} is not a file")
        return None

    def resolve_password(self) -> str:
        """Return the password from wherever it is configured to be.

        Raises
        ------
        ConfigError
            If the variable is not set or the file cannot be read.
        """
        if self.password_env is not None:
            try:
                return os.environ[self.password_env]
            except KeyError:
                raise ConfigError(
                    f"volatile_db.password_env: {self.password_env} is not set"
                ) from None
        if self.password_file is not None:
            try:
                return FilePath(self.password_file).read_text().rstrip("\r\n")
            except (OSError, UnicodeDecodeError) as exc:
                reason = getattr(exc, "strerror", "it is not text")
                raise ConfigError(
                    f"volatile_db.password_file: {self.password_file} cannot be read: "
                    f"{reason}"
                ) from None
        return self.password.get_secret_value()


def _is_set(password: SecretStr | str | None) -> bool:
    if isinstance(password, SecretStr):
        password = password.get_secret_value()
    return bool(password)


def _lacks_type(
    name: str, values: dict[str, Any], findings: Findings, path: Path
) -> bool:
    """Return, and note, whether this is a block of ps.json without ``type``."""
    lacks = bool(path or findings.from_json) and name not in values
    if lacks:
        findings.note(path, "has no type, which disables it")
    return lacks


class PersistentDatabaseParams(ConfigModel):
    """``persistent_db``: every row, on disk."""

    obsolete: ClassVar[Mapping[str, str]] = _OLD_BATCH_KEYS

    backend: Annotated[DatabaseType, PERSISTENT_TYPES] = Field(
        DatabaseType.DISABLED, alias="type", description="Kind of database."
    )
    path: Text = computed(
        lambda: f"{tempfile.gettempdir()}/rocksdb",
        "<temporary directory>/rocksdb",
        "Directory of the database; one process at a time may write it.",
    )
    num_threads: SmallCount = Field(
        16, description="Threads that read a large batch together."
    )
    read_only: bool = Field(False, description="Refuse everything that writes.")
    max_batch_size: Count = Field(
        65_536, description="Most keys per read, and most rows per atomic write."
    )
    cache_bytes: Size = own(256 << 20, "Block cache for all tables.")
    direct_reads: bool = own(
        False, "Read around the operating system's page cache (O_DIRECT)."
    )
    initialize_after_startup: bool = Field(
        True,
        description="Load model directories that are not stored yet, or have changed, "
        "when a model is opened.",
    )
    update_filters: tuple[TopicFilter, ...] = Field(
        _DEFAULT_FILTERS, description="As for volatile_db."
    )

    @classmethod
    def complete(cls, values: dict[str, Any], findings: Findings, path: Path) -> None:
        """Note that a block of ps.json without ``type`` stores nothing."""
        _lacks_type("backend", values, findings, path)


class UpdateSourceParams(ConfigModel):
    """``update_source``: the stream that brings new rows."""

    obsolete: ClassVar[Mapping[str, str]] = {
        "max_receive_buffer_size": "receive_buffer_size replaced it"
    }

    type: Annotated[UpdateSourceType, UPDATE_SOURCE_TYPES] = Field(
        UpdateSourceType.NULL, description="Kind of stream."
    )
    brokers: Text = Field(
        "127.0.0.1:9092", description="Brokers, host[:port], separated by semicolons."
    )
    metadata_refresh_interval_ms: Annotated[int, Field(ge=10, le=MAX_SIZE)] = Field(
        30_000, description="How often new topics are looked for, in ms."
    )
    receive_buffer_size: Annotated[int, Field(ge=1024, le=MAX_SIZE)] = Field(
        262_144,
        description="What a fetch asks for, in bytes; larger messages come alone.",
    )
    poll_timeout_ms: Size = idle(500, "rows never wait for a batch to fill")
    max_batch_size: Count = idle(
        8_192, "as many rows as wait are applied, in pieces that lookups do not notice"
    )
    failure_backoff_ms: Size = Field(
        50,
        description="Wait before a failed write is repeated, in ms; doubled each time, "
        "up to 5 s.",
    )
    max_commit_interval: Count = Field(
        32, description="Most messages between two commits."
    )
    initial_offset: Annotated[InitialOffset, INITIAL_OFFSETS] = own(
        InitialOffset.EARLIEST,
        "Where a partition of a topic begins that no database has read of.",
    )
    offset_reset: Annotated[OffsetReset, OFFSET_RESETS] = own(
        OffsetReset.EARLIEST,
        "Where a partition goes on when the messages that come next are not there: "
        "retention removed them, or the topic was made anew. stop: nowhere, until "
        "seek() says where.",
    )
    burst_rows: Size = own(
        16_384,
        "Rows of a partition that wait, from which on they are applied as one burst. "
        "0: never.",
    )
    dead_letter_file: Text | None = own(
        None, "File that messages are appended to that cannot be applied."
    )
    dead_letter_topic: Text | None = own(
        None, "Topic that messages are sent to that cannot be applied."
    )
    kafka: KafkaSettings = own(
        KafkaSettings(),
        "Settings of librdkafka, by its names, such as security.protocol and "
        "sasl.password. Values of secrets are never shown.",
    )

    @classmethod
    def complete(cls, values: dict[str, Any], findings: Findings, path: Path) -> None:
        """Note that a block of ps.json without ``type`` brings nothing."""
        _lacks_type("type", values, findings, path)
