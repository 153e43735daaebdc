"""Results in words, and the goals among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bench.gpu.records import Line


def describe(line: Line) -> str:
    """Return a result as one line: what, how long, how fast, against what."""
    params = " ".join(f"{k}={v}" for k, v in line.params.items())
    if line.unit == "s":
        spread = f"{line.p05 * 1e6:.4g} to {line.p95 * 1e6:.4g}"
        value = f"{line.median * 1e6:.4g} us ({spread})  {line.rate / 1e9:.4g} G/s"
    else:
        value = f"{line.median:.4g} {line.unit}"
    ratios = [f"{r.median:.3g} x {r.against}" for r in line.ratios]
    missing = [f"absent: {name}" for name in line.absent]
    marks = [f"[{', '.join(line.marks)}]"] if line.marks else []
    return " | ".join(
        [f"{line.name} {params}", line.variant, value, *ratios, *missing, *marks]
    )


def goals_table(lines: Iterable[Line]) -> str:
    """Return every goal with what was measured, a line each."""
    rows = []
    for line in lines:
        params = " ".join(f"{k}={v}" for k, v in line.params.items())
        for one in line.ratios:
            if one.floor is not None:
                sign = "at least" if one.sense == "at_least" else "at most"
                verdict = "met" if one.met else "MISSED"
                what = f"{line.name}, {line.variant} ({params})"
                rows.append(
                    f"{verdict:<6}  {what}: {one.median:.3g} x {one.against}, "
                    f"goal {sign} {one.floor:g}"
                )
    return "\n".join(["goals:", *(rows or ["  none was measured"])])


def summary(lines: Iterable[Line], left_over: Mapping[str, str]) -> str:
    """Return what there is to know at the end: what did not run, and the goals."""
    missing = [f"left out: {name}: {why}" for name, why in left_over.items()]
    return "\n".join([*missing, goals_table(lines)])
