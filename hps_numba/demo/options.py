"""What can be chosen when the demo is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hps_numba.errors import ConfigError


@dataclass(frozen=True)
class DemoOptions:
    """Options of ``hps_numba.demo.run``.

    Parameters
    ----------
    output
        Directory for the model directories, ``ps.json``, the database, the plot and the
        report. It must be new, empty, or of an earlier demo.
    requests
        Number of requests, counted from the first sample; None for all.
    batch
        Samples per request.
    trace
        File of int64 keys to replay instead of the flights: raw little-endian, or
        ``.npy``. Each key is a sample.
    update_share
        Share of the rows that get new versions during the replay, 0 to 1.
    host_share
        Bytes of host memory, as a share of the bytes of all tables, above 0.
    seed
        Decides which rows are updated, and when.
    gpu
        Look up through the GPU cache if there is a GPU.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    output: Path = Path("demo-output")
    requests: int | None = None
    batch: int = 1024
    trace: Path | None = None
    update_share: float = 0.05
    host_share: float = 0.35
    seed: int = 20130101
    gpu: bool = True

    def __post_init__(self) -> None:
        if self.requests is not None and self.requests < 1:
            raise ConfigError(f"demo: requests={self.requests}; at least 1 is needed")
        if self.batch < 1:
            raise ConfigError(f"demo: batch={self.batch}; at least 1 is needed")
        if not 0 <= self.update_share <= 1:
            raise ConfigError(f"demo: update_share={self.update_share}; use 0 to 1")
        if not self.host_share > 0:
            raise ConfigError(f"demo: host_share={self.host_share}; use more than 0")
