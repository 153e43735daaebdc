"""One entry of ``models`` in ps.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from hps_numba.config.base import ConfigModel
from hps_numba.config.enums import (
    CACHE_TYPES,
    DUPLICATE_KEYS,
    NON_FINITE,
    ROW_DTYPES,
    DuplicateKeys,
    EmbeddingCacheType,
    NonFinite,
)
from hps_numba.config.fields import (
    Count,
    Name,
    RowValue,
    Seconds,
    Share,
    Size,
    SmallCount,
    Text,
    idle,
    own,
)
from hps_numba.config.findings import Findings, Path, Problem
from hps_numba.types import RowDtype, TableSpec

_SHARED_BLOCKS = ("volatile_db", "persistent_db", "update_source")
_DENSE = "it concerns HugeCTR's dense network"
_LISTS = {
    # Per-table lists, with HugeCTR's default of one entry.
    "maxnum_catfeature_query_per_table_per_sample": 26,
    "embedding_vecsize_per_table": 128,
}


class InferenceParams(ConfigModel):
    """A model and its tables; lists have one entry per table."""

    obsolete: ClassVar[Mapping[str, str]] = dict.fromkeys(
        _SHARED_BLOCKS, "the server has one for all models"
    )

    model_name: Name = Field(alias="model", description="Name of the model.")
    max_batchsize: Count = Field(
        64,
        alias="max_batch_size",
        description="Most samples per lookup. Times the entry of maxnum_catfeature_"
        "query_per_table_per_sample it is the most keys of a table per lookup.",
    )
    hit_rate_threshold: Annotated[float, Field(ge=0)] = Field(
        0.9,
        description="At or above this hit rate of the GPU cache, misses get the "
        "default row at once and are fetched in the background; above 1 never.",
    )
    dense_model_file: str = Field("", alias="dense_file", description="Not read.")
    sparse_model_files: tuple[Text, ...] = Field(
        (),
        alias="sparse_files",
        description="A model directory per table. Empty for tables that only updates "
        "fill; embedding_table_names then tells how many there are.",
    )
    device_id: Size = Field(0, description="Taken from deployed_device_list.")
    use_gpu_embedding_cache: bool = Field(
        True, alias="gpucache", description="Keep rows in a GPU cache."
    )
    cache_size_percentage: Share = Field(
        0.2, alias="gpucacheper", description="Share of a table's rows on the GPU."
    )
    i64_input_key: bool = Field(
        True, description="Set from supportlonglong; keys of any integer type work."
    )
    use_mixed_precision: bool = idle(False, _DENSE)
    scaler: float = idle(1.0, _DENSE)
    use_algorithm_search: bool = idle(True, _DENSE)
    use_cuda_graph: bool = idle(True, _DENSE)
    number_of_worker_buffers_in_pool: SmallCount = Field(
        1,
        alias="num_of_worker_buffer_in_pool",
        description="Buffers per GPU cache for lookups and insertions.",
    )
    number_of_refresh_buffers_in_pool: Size = Field(
        1,
        alias="num_of_refresher_buffer_in_pool",
        description="Buffers per GPU cache for refreshing.",
    )
    thread_pool_size: SmallCount = Field(
        16, description="Threads of the remote stage of lookups, for all models."
    )
    cache_refresh_percentage_per_iteration: Share = Field(
        0.0, description="Share of the GPU cache that one step refreshes; 0 for none."
    )
    deployed_devices: tuple[Size, ...] = Field(
        (0,),
        alias="deployed_device_list",
        description="Devices that the model may be looked up on.",
    )
    default_value_for_each_table: tuple[RowValue, ...] = Field(
        (),
        description="Value of the default row, per table. One value serves all tables; "
        "a shorter list in ps.json is filled with 0.",
    )
    maxnum_des_feature_per_sample: Size = idle(26, _DENSE)
    refresh_delay: Seconds = idle(0.0, "refreshing begins with the first interval")
    refresh_interval: Seconds = Field(
        0.0, description="Seconds between refreshes of the GPU cache; 0 for none."
    )
    maxnum_catfeature_query_per_table_per_sample: tuple[Count, ...] = Field(
        (), description="Most keys per sample, per table."
    )
    embedding_vecsize_per_table: tuple[SmallCount, ...] = Field(
        (), description="Dim of the rows, per table."
    )
    embedding_table_names: tuple[Name, ...] = Field(
        (), description="Names of the tables; sparse_embedding0 and so on by default."
    )
    network_file: str = idle("", _DENSE)
    label_dim: Size = idle(1, _DENSE)
    slot_num: Size = idle(10, _DENSE)
    non_trainable_params_file: str = idle("", _DENSE)
    use_static_table: bool = Field(
        False, description="The same as embedding_cache_type static."
    )
    embedding_cache_type: Annotated[EmbeddingCacheType, CACHE_TYPES] = Field(
        EmbeddingCacheType.DYNAMIC, description="Kind of GPU cache."
    )
    use_context_stream: bool = Field(
        True, description="Run on the caller's CUDA stream."
    )
    fuse_embedding_table: bool = idle(
        True, "tables of one model are looked up together in any case"
    )
    use_hctr_cache_implementation: bool = idle(True, "there is one implementation")
    init_ec: bool = Field(True, description="Warm the GPU cache up at the start.")
    enable_pagelock: bool = Field(
        False, description="Static cache: keep rows in pinned host memory."
    )
    fp8_quant: bool = Field(
        False, description="Static cache: keep rows in 8 bits per value."
    )
    row_dtype_per_table: tuple[Annotated[RowDtype, ROW_DTYPES], ...] = own(
        (), "How rows are stored, per table: float32 or float16. Lookups give float32."
    )
    host_bytes_per_table: tuple[Count, ...] | None = own(
        None, "Part of volatile_db.max_bytes for each table; null shares it by need."
    )
    duplicate_keys: Annotated[DuplicateKeys, DUPLICATE_KEYS] = own(
        DuplicateKeys.LAST_WINS,
        "What a key means that a model directory holds twice: last_wins or refuse.",
    )
    non_finite: Annotated[NonFinite, NON_FINITE] = own(
        NonFinite.ALLOW, "Rows of a model directory with NaN or infinity."
    )

    @classmethod
    def argument_order(cls) -> tuple[str, ...]:
        """Return HugeCTR's order of positional arguments."""
        names = super().argument_order()
        end = names.index("default_value_for_each_table") + 1
        return (*names[:end], *_SHARED_BLOCKS, *names[end:])

    @classmethod
    def complete(cls, values: dict[str, Any], findings: Findings, path: Path) -> None:
        """Fill per-table lists to the number of tables where HugeCTR does."""
        if values.get("use_static_table") is True:
            values["embedding_cache_type"] = EmbeddingCacheType.STATIC
        n_tables = _count(values)
        if n_tables is None:
            return
        for name, default in _LISTS.items():
            if values.get(name, ()) == () and n_tables == 1:
                values[name] = (default,)
        if values.get("embedding_table_names", ()) in ((), ("",)):
            names = tuple(f"sparse_embedding{i}" for i in range(n_tables))
            values["embedding_table_names"] = names
        defaults = values.get("default_value_for_each_table", ())
        if isinstance(defaults, tuple) and len(defaults) < n_tables:
            in_json = bool(path) or findings.from_json
            value = defaults[0] if len(defaults) == 1 and not in_json else 0.0
            fill = (value,) * (n_tables - len(defaults))
            values["default_value_for_each_table"] = (*defaults, *fill)
        if values.get("row_dtype_per_table", ()) == ():
            values["row_dtype_per_table"] = (RowDtype.FLOAT32,) * n_tables

    def problems(self) -> list[Problem]:
        """Return what keeps the tables from being served.

        Found when the model is used, since HugeCTR's Python interface describes tables
        in ``ParameterServerConfig`` only.
        """
        n_tables = len(self.embedding_table_names)
        found = []
        for name in (
            "sparse_model_files",
            "embedding_vecsize_per_table",
            "maxnum_catfeature_query_per_table_per_sample",
            "default_value_for_each_table",
            "row_dtype_per_table",
            "host_bytes_per_table",
        ):
            given = getattr(self, name) or ()
            optional = name in ("sparse_model_files", "host_bytes_per_table")
            if len(given) != n_tables and (given or not optional):
                text = f"has {len(given)} entries for {n_tables} tables"
                found.append(Problem((name,), text))
        if not n_tables:
            found.append(Problem(("sparse_model_files",), "names no table"))
        for i, name in enumerate(self.embedding_table_names):
            if name in self.embedding_table_names[:i]:
                text = f'"{name}" is used twice'
                found.append(Problem(("embedding_table_names", i), text))
        if not self.deployed_devices:
            found.append(Problem(("deployed_devices",), "needs at least one device"))
        return found

    def tables(self) -> tuple[TableSpec, ...]:
        """Return the model's tables, in order.

        Raises
        ------
        ConfigError
            If the lists do not describe the same tables.
        """
        findings = Findings(f"model {self.model_name}", from_json=False)
        for problem in self.problems():
            findings.problem(problem.path, problem.text)
        findings.raise_problems()
        return tuple(
            TableSpec(
                self.model_name,
                name,
                dim,
                dtype=dtype,
                default_value=default,
                max_keys=self.max_batchsize * per_sample,
            )
            for name, dim, dtype, default, per_sample in zip(
                self.embedding_table_names,
                self.embedding_vecsize_per_table,
                self.row_dtype_per_table,
                self.default_value_for_each_table,
                self.maxnum_catfeature_query_per_table_per_sample,
                strict=True,
            )
        )


def _count(values: dict[str, Any]) -> int | None:
    """Return how many tables the given lists speak of, None if they are no lists."""
    for name in ("embedding_table_names", "sparse_model_files", *_LISTS):
        given = values.get(name)
        if given and given != ("",):
            return len(given) if isinstance(given, tuple) else None
    return 1 if values.get("embedding_table_names") == ("",) else None
