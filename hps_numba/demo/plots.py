"""The demo's plot: latency, sources of rows, and staleness over the replay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hps_numba.demo.report import Outcome
from hps_numba.errors import HPSError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

_BLUE, _ORANGE, _GREY, _INK = "#2f6db3", "#e0812f", "#b9bec6", "#30343b"
_STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8eaee",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
_MEDIAN_WINDOW = 15


def write_plot(outcome: Outcome, path: Path) -> None:
    """Draw the figures of a run as a PNG file.

    Parameters
    ----------
    outcome
        What the run measured.
    path
        The file to write.

    Raises
    ------
    HPSError
        If matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise HPSError(
            "the demo draws its plot with matplotlib, which is not installed; "
            "run: pip install 'hps-numba[demo]'"
        ) from exc
    with rc_context(_STYLE):
        figure = Figure(figsize=(12.5, 8), layout="constrained")
        FigureCanvasAgg(figure)
        (over_time, distribution), (sources, staleness) = figure.subplots(2, 2)
        _draw_latency(over_time, outcome)
        _draw_distribution(distribution, outcome)
        _draw_sources(sources, outcome)
        _draw_staleness(staleness, outcome)
        figure.suptitle(_title(outcome), x=0.01, ha="left", fontsize=13, weight="bold")
        figure.savefig(path, dpi=110)


def _title(outcome: Outcome) -> str:
    return (
        f"{outcome.workload.title}\n{outcome.path}: {outcome.replay.n_keys:,} keys, "
        f"{outcome.keys_per_s:,.0f} keys/s, {outcome.total.rows:,} rows checked, "
        f"{outcome.total.wrong_rows:,} wrong"
    )


def _times(outcome: Outcome, requests: NDArray[np.int64]) -> tuple[Any, str]:
    """Return where requests are on the axis of time, and the axis' title."""
    workload = outcome.workload
    if workload.dates is None:
        return requests, "request"
    samples = np.minimum(requests * workload.batch, workload.n_samples - 1)
    return workload.dates[samples], "day of the flights in a request"


def _round_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers: 1, 2, 5, 10 and so on."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _show_months(axes: Axes, outcome: Outcome) -> None:
    """Label an axis of dates with the names of months or days."""
    if outcome.workload.dates is None:
        return
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator(minticks=4)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def _mark_cut_off(axes: Axes, outcome: Outcome) -> None:
    """Show from where on there are ids that the model was not trained on."""
    workload = outcome.workload
    request = np.array([workload.cut_off // workload.batch])
    at = _times(outcome, request)[0][0]
    axes.axvline(at, color=_INK, linestyle=":", linewidth=1.2)
    axes.annotate(
        "end of training",
        (at, 0.04),
        xycoords=("data", "axes fraction"),
        xytext=(-8, 0),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2},
    )


def _draw_latency(axes: Axes, outcome: Outcome) -> None:
    replay = outcome.replay
    milliseconds = replay.latencies_s * 1000
    times, label = _times(outcome, np.arange(len(milliseconds)))
    updated = _overlaps_update(outcome)
    plain = ~updated
    axes.scatter(times[plain], milliseconds[plain], s=9, color=_BLUE, alpha=0.5)
    axes.scatter(times[updated], milliseconds[updated], s=9, color=_ORANGE, alpha=0.6)
    axes.plot(times, _running_median(milliseconds), color=_INK, linewidth=1.4)
    axes.set_yscale("log")
    _round_ticks(axes.yaxis)
    axes.set(title="Time per request", ylabel="ms", xlabel=label)
    axes.set_ylim(top=milliseconds.max() * 2)  # room for the legend
    _show_months(axes, outcome)
    axes.legend(
        ["request", "request during an update", f"median of {_MEDIAN_WINDOW}"],
        loc="upper left",
        ncols=3,
        framealpha=0.8,
        edgecolor="none",
        fontsize=9,
    )


def _overlaps_update(outcome: Outcome) -> NDArray[np.bool_]:
    """Return which requests ran while an update did."""
    began = np.array([request.began_s for request in outcome.replay.requests])
    ended = began + outcome.replay.latencies_s
    sent = np.array([update.sent_s for update in outcome.updates])
    done = np.array([u.sent_s + u.acknowledged_s for u in outcome.updates])
    # Updates do not overlap each other, so both arrays ascend.
    overlaps: NDArray[np.bool_] = np.searchsorted(sent, ended) > np.searchsorted(
        done, began
    )
    return overlaps


def _running_median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    half = _MEDIAN_WINDOW // 2
    padded = np.pad(values, half, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, _MEDIAN_WINDOW)
    medians: NDArray[np.float64] = np.median(windows, axis=1)
    return medians


def _draw_distribution(axes: Axes, outcome: Outcome) -> None:
    milliseconds = np.sort(outcome.replay.latencies_s) * 1000
    shares = np.arange(1, len(milliseconds) + 1) / len(milliseconds)
    axes.plot(milliseconds, shares * 100, color=_BLUE, linewidth=2)
    latency = outcome.latency
    marks = (
        (50, latency.p50_ms, 0),
        (95, latency.p95_ms, -2),
        (99, latency.p99_ms, 8),
    )
    for percent, value, raised in marks:
        axes.plot([value], [percent], "o", color=_INK, markersize=4)
        axes.annotate(
            f"p{percent}  {value:.2f} ms",
            (value, percent),
            xytext=(-8, raised),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=9,
        )
    axes.set_xscale("log")
    _round_ticks(axes.xaxis)
    axes.set(
        title="Distribution of the time per request",
        xlabel="ms",
        ylabel="% of requests",
        ylim=(0, 107),
    )


def _draw_sources(axes: Axes, outcome: Outcome) -> None:
    samples = outcome.replay.samples
    keys, upper, defaults = (
        np.diff([getattr(sample, name) for sample in samples])
        for name in ("keys", "upper_hits", "defaults")
    )
    shares = np.stack([upper, keys - upper - defaults, defaults]) * 100 / keys
    first, *below = (tier.title for tier in outcome.tiers())
    ends = np.array([sample.request for sample in samples])
    times, label = _times(outcome, ends)
    # Each interval is drawn from its beginning to its end.
    axes.stackplot(
        np.repeat(times, 2)[1:-1],
        np.repeat(shares, 2, axis=1),
        colors=[_BLUE, _ORANGE, _GREY],
        labels=[first, " and ".join(below), "default row"],
        linewidth=0,
    )
    _mark_cut_off(axes, outcome)
    axes.set(title="Where rows came from", xlabel=label, ylabel="% of keys")
    axes.set_ylim(0, 100)
    _show_months(axes, outcome)
    axes.legend(loc="lower left", fontsize=9, framealpha=0.9)


def _draw_staleness(axes: Axes, outcome: Outcome) -> None:
    axes.set(
        title="Updates: time since update() was called",
        xlabel="ms",
        ylabel="% of updates",
        ylim=(0, 107),
    )
    if not outcome.updates:
        axes.annotate("no updates", (0.5, 0.5), xycoords="axes fraction", ha="center")
        return
    curves = (
        ("acknowledged", _GREY, [u.acknowledged_s for u in outcome.updates]),
        ("seen by a lookup", _BLUE, [u.visible_s for u in outcome.updates]),
    )
    for title, color, seconds in curves:
        milliseconds = np.sort(seconds) * 1000
        shares = np.arange(1, len(milliseconds) + 1) * 100 / len(milliseconds)
        axes.plot(milliseconds, shares, color=color, linewidth=2, label=title)
    axes.set_xscale("log")
    _round_ticks(axes.xaxis)
    axes.legend(loc="upper left", frameon=False, fontsize=9)
