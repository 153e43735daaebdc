"""One entry of ``models`` in ps.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from hps_numba.config.base import ConfigModel
from hps_numba.config.enums import (
    CACHE_TYPES,
    DUPLICATE_KEYS,
    GPU_CACHE_POLICIES,
    NON_FINITE,
    ROW_DTYPES,
    DuplicateKeys,
    EmbeddingCacheType,
    GpuCachePolicy,
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
_OPTIONAL_LISTS = (
    "sparse_model_files",
    "host_bytes_per_table",
    "warm_up_rows_per_table",
    "warm_up_keys_per_table",
)
_AS_DYNAMIC = (EmbeddingCacheType.UVM, EmbeddingCacheType.STOCHASTIC)


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
        description="At or above this hit rate of a table's unique keys in the GPU "
        "cache, misses get the default row at once and are fetched in the background; "
        "from 1 on, every lookup waits for its rows.",
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
        True,
        alias="gpucache",
        description="Keep rows in a GPU cache. Without a GPU they are served from host "
        "memory, with one warning.",
    )
    cache_size_percentage: Share = Field(
        0.2,
        alias="gpucacheper",
        description="Share of a table's rows on the GPU. 1 gives every row a place, "
        "which takes more room than there are rows. A table without files has room for "
        "the keys of one lookup.",
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
        description="Buffers of a GPU cache: lookups that it works on at the same "
        "time; more wait.",
    )
    number_of_refresh_buffers_in_pool: Size = idle(
        1,
        "the tables of a GPU cache are refreshed one after the other",
        alias="num_of_refresher_buffer_in_pool",
    )
    thread_pool_size: SmallCount = Field(
        16, description="Threads of the remote stage of lookups, for all models."
    )
    cache_refresh_percentage_per_iteration: Share = Field(
        0.0,
        description="Share of a table's GPU cache that one step of a refresh reads "
        "again; 0 for no refreshes.",
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
        EmbeddingCacheType.DYNAMIC,
        description="Kind of GPU cache. static has a place for every row and evicts "
        "none; uvm and stochastic are served as dynamic.",
    )
    use_context_stream: bool = idle(
        True, "a lookup runs on the stream that it is given"
    )
    fuse_embedding_table: bool = idle(
        True, "tables of one model are looked up together in any case"
    )
    use_hctr_cache_implementation: bool = idle(True, "there is one implementation")
    init_ec: bool = Field(
        True,
        description="Warm the GPU cache up before the model is served; see "
        "warm_up_rows_per_table and warm_up_keys_per_table.",
    )
    enable_pagelock: bool = idle(False, "cached rows are in device memory")
    fp8_quant: bool = idle(False, "rows are stored as row_dtype_per_table says")
    row_dtype_per_table: tuple[Annotated[RowDtype, ROW_DTYPES], ...] = own(
        (), "How rows are stored, per table: float32 or float16. Lookups give float32."
    )
    require_gpu: bool = own(
        False, "Refuse to serve the model where gpucache finds no GPU to use."
    )
    gpu_cache_bytes: Count | None = own(
        None,
        "Bytes of the model's GPU cache on each device: all tables get the same share "
        "of their rows, the largest that fits. null sizes them by gpucacheper.",
    )
    gpu_cache_policy: Annotated[GpuCachePolicy, GPU_CACHE_POLICIES] = own(
        GpuCachePolicy.LRU,
        "Which rows a dynamic GPU cache gives up: lru, those not used for longest, or "
        "lfu, those used least often.",
    )
    warm_up_rows_per_table: tuple[Size, ...] | None = own(
        None, "Rows that the warm-up loads, per table; null for all there is room for."
    )
    warm_up_keys_per_table: tuple[str, ...] | None = own(
        None,
        "Files of the keys that the warm-up loads, per table: .npy, int64, the most "
        "frequent first, or (n, 2) with the count of each. Empty, or null for all "
        "tables: the first rows of the model directory.",
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
        kind = CACHE_TYPES.find(values.get("embedding_cache_type"))
        if kind in _AS_DYNAMIC and values.get("use_gpu_embedding_cache", True):
            where = (*path, "embedding_cache_type")
            findings.note(where, f"{kind.value} is served as dynamic")
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
            "embedding_vecsize_per_table",
            "maxnum_catfeature_query_per_table_per_sample",
            "default_value_for_each_table",
            "row_dtype_per_table",
            *_OPTIONAL_LISTS,
        ):
            given = getattr(self, name) or ()
            if len(given) != n_tables and (given or name not in _OPTIONAL_LISTS):
                text = f"has {len(given)} entries for {n_tables} tables"
                found.append(Problem((name,), text))
        if not n_tables:
            found.append(Problem(("sparse_model_files",), "names no table"))
        for i, name in enumerate(self.embedding_table_names):
            if name in self.embedding_table_names[:i]:
                text = f'"{name}" is used twice'
                found.append(Problem(("embedding_table_names", i), text))
        if self.require_gpu and not self.use_gpu_embedding_cache:
            found.append(
                Problem(("require_gpu",), "is true although gpucache is false")
            )
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
