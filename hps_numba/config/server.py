"""The whole of ps.json."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator
from typing_extensions import Self

from hps_numba.config.base import ConfigModel
from hps_numba.config.databases import (
    PersistentDatabaseParams,
    UpdateSourceParams,
    VolatileDatabaseParams,
)
from hps_numba.config.enums import FAILURE_MODES
from hps_numba.config.fields import Count, idle, own
from hps_numba.config.findings import Findings, InconsistentError, Path, Problem
from hps_numba.config.models import InferenceParams
from hps_numba.config.reading import read_json
from hps_numba.errors import ConfigError, UnknownTableError
from hps_numba.types import FailureMode

_BY_MODEL = {
    # HugeCTR's Python arguments, each a mapping from a model to a per-table list.
    "emb_table_name": "embedding_table_names",
    "embedding_vec_size": "embedding_vecsize_per_table",
    "max_feature_num_per_sample_per_emb_table": (
        "maxnum_catfeature_query_per_table_per_sample"
    ),
}


class ParameterServerConfig(ConfigModel):
    """Everything that a server needs to know.

    Takes the keys of ps.json, or HugeCTR's Python arguments: ``emb_table_name``,
    ``embedding_vec_size`` and ``max_feature_num_per_sample_per_emb_table``, which map
    models to lists, and ``inference_params_array``.
    """

    ignored: ClassVar[frozenset[str]] = frozenset({"$schema"})

    supportlonglong: bool = Field(
        True, description="Whether keys are 64 bits wide on the caller's side."
    )
    fuse_embedding_table: bool = idle(
        False, "tables of one model are looked up together in any case"
    )
    on_tier_failure: Annotated[FailureMode, FAILURE_MODES] = own(
        FailureMode.RAISE,
        "What a lookup does when a tier fails: raise, or degrade: serve what the other "
        "tiers have, and count it.",
    )
    backfill_queue_bytes: Count = own(
        64 << 20, "Most bytes of rows that wait to be backfilled; more are dropped."
    )
    volatile_db: VolatileDatabaseParams = Field(
        default_factory=VolatileDatabaseParams, description="Rows in memory."
    )
    persistent_db: PersistentDatabaseParams = Field(
        default_factory=PersistentDatabaseParams, description="Rows on disk."
    )
    update_source: UpdateSourceParams = Field(
        default_factory=UpdateSourceParams, description="Stream of new rows."
    )
    models: tuple[InferenceParams, ...] = Field(description="Models, at least one.")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str], *, strict: bool = True) -> Self:
        """Return the configuration that a file describes.

        Parameters
        ----------
        path
            A ps.json.
        strict
            Whether unknown keys are errors; otherwise they are logged.

        Raises
        ------
        ConfigError
            If the file cannot be read or used; the message has all problems with their
            JSON paths.
        """
        content = read_json(path, strict=strict)
        if not isinstance(content, dict):
            raise ConfigError(f"{os.fspath(path)}: the file must hold a JSON object")
        findings = Findings(os.fspath(path), from_json=True, strict=strict)
        return cls.read(content, findings)

    def model(self, name: str) -> InferenceParams:
        """Return the parameters of a model."""
        for params in self.models:
            if params.model_name == name:
                return params
        raise UnknownTableError(
            f"no model {name!r} is configured; there are "
            f"{', '.join(m.model_name for m in self.models)}"
        )

    @classmethod
    def argument_order(cls) -> tuple[str, ...]:
        """Return HugeCTR's order of positional arguments."""
        shared = ("volatile_db", "persistent_db", "update_source")
        return (*_BY_MODEL, "inference_params_array", *shared)

    @classmethod
    def _arranged(cls, data: dict[str, Any], findings: Findings) -> dict[str, Any]:
        arranged = dict(data)
        array = arranged.pop("inference_params_array", None)
        if array is not None:
            if "models" in arranged:
                findings.problem(("models",), "is also given as inference_params_array")
            arranged["models"] = array
        changes: dict[str, dict[str, Any]] = {}
        for argument, field in _BY_MODEL.items():
            by_model = arranged.pop(argument, None) or {}
            if not isinstance(by_model, Mapping):
                findings.problem((argument,), "is not a mapping from model to list")
                continue
            for model, values in by_model.items():
                changes.setdefault(model, {})[field] = values
        models = arranged.get("models")
        if changes and isinstance(models, (list, tuple)):
            arranged["models"] = tuple(_changed(m, changes, findings) for m in models)
            for model in changes:
                findings.problem(("models",), f'has no model "{model}"')
        return arranged

    @classmethod
    def complete(cls, values: dict[str, Any], findings: Findings, path: Path) -> None:
        """Give all models one width of keys, wherever it was stated."""
        models = values.get("models")
        if not isinstance(models, tuple):
            return
        widths = [_key_width(model) for model in models]
        stated = [width for width in widths if width is not None]
        whole = values.setdefault("supportlonglong", stated[0] if stated else True)
        for i, width in enumerate(widths):
            if width is not None and width != whole:
                text = "differs from supportlonglong or another model; all share one"
                findings.problem(("models", i, "i64_input_key"), text)
        if isinstance(whole, bool):
            values["models"] = tuple(_with_key_width(m, whole) for m in models)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Check what concerns several models."""
        names = [model.model_name for model in self.models]
        problems = [
            Problem(("models", i, "model_name"), f'"{name}" is used twice')
            for i, name in enumerate(names)
            if name in names[:i]
        ]
        problems += [
            Problem(("models", i, *problem.path), problem.text)
            for i, model in enumerate(self.models)
            for problem in model.problems()
        ]
        problems += self._over_budget()
        if not names:
            problems.append(Problem(("models",), "needs at least one model"))
        if problems:
            raise InconsistentError(problems)
        return self

    def _over_budget(self) -> Iterator[Problem]:
        budget = self.volatile_db.max_bytes
        parts = sum(sum(m.host_bytes_per_table or ()) for m in self.models)
        if budget is not None and parts > budget:
            text = f"{budget} is less than all host_bytes_per_table together ({parts})"
            yield Problem(("volatile_db", "max_bytes"), text)


def _changed(model: Any, changes: dict[str, dict[str, Any]], findings: Findings) -> Any:
    if isinstance(model, InferenceParams):
        given = changes.pop(model.model_name, {})
        return model.replace(**given) if given else model
    if isinstance(model, Mapping):
        name = model.get("model_name", model.get("model"))
        return {**model, **changes.pop(name, {})}
    return model


def _key_width(model: Any) -> bool | None:
    """Return what a model says about its keys, None if nothing."""
    if isinstance(model, InferenceParams):
        stated = "i64_input_key" in model.model_fields_set
        return model.i64_input_key if stated else None
    width = model.get("i64_input_key") if isinstance(model, Mapping) else None
    return width if isinstance(width, bool) else None


def _with_key_width(model: Any, whole: bool) -> Any:
    if isinstance(model, InferenceParams):
        same = model.i64_input_key == whole
        return model if same else model.replace(i64_input_key=whole)
    if isinstance(model, dict):
        model.setdefault("i64_input_key", whole)
    return model
