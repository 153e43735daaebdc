"""The figures and excerpts of docs/gpu.md are those of their sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.gpu import plan
from bench.gpu.report import MARKED, SECTIONS
from hps_numba.config import InferenceParams
from hps_numba.kernels.cuda.layout import CacheLayout, RowLayout, TableLayout
from hps_numba.runtime.gpu.lane_layout import LaneLayout, buffer_bytes, lane_layouts
from hps_numba.runtime.gpu.sizing import plan_cache, sets_for_all

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "gpu.md").read_text()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()

SHOWN = [
    ("zipf 0.9", 10_000, 4096),
    ("zipf 0.9", 200_000, 4096),
    ("zipf 1.05", 10_000, 4096),
    ("zipf 1.05", 200_000, 4096),
    ("zipf 1.05", 200_000, 65_536),
    ("zipf 1.2", 10_000, 4096),
    ("zipf 1.2", 200_000, 4096),
    ("zipf 1.05, drifting", 66_000, 4096),
    ("zipf 1.05, a fifth scanned", 66_000, 4096),
    ("orm-busy", 7634, 1024),
    ("orm-night", 8646, 1024),
    ("web07", 2048, 256),
    ("web12", 1375, 256),
]
HEAD = (
    "| keys | rows in the cache | batch | LRU | LRU, unique | LFU | LFU, unique "
    "| ideal |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
)
COLUMNS = [
    ("policy_hits", "LRU"),
    ("policy_unique_hits", "LRU"),
    ("policy_hits", "LFU"),
    ("policy_unique_hits", "LFU"),
    ("policy_hits", "ideal static"),
]


def between(begin: str, end: str) -> str:
    return PAGE.partition(f"<!-- {begin} -->\n")[2].partition(f"<!-- {end} -->")[0]


def hit_rates() -> str:
    results = (ROOT / "bench" / "results" / "policy.jsonl").read_text().splitlines()
    rates = {}
    for one in map(json.loads, results):
        at = (one["params"].get(name) for name in ("keys", "capacity", "batch"))
        rates[(one["name"], one["variant"], *at)] = one["median"]
    lines = [
        f"| {keys} | {capacity:,} | {batch:,} | "
        + " | ".join(
            f"{rates[name, variant, keys, capacity, batch]:.0%}"
            for name, variant in COLUMNS
        )
        + " |"
        for keys, capacity, batch in SHOWN
    ]
    return "\n".join([HEAD, *lines, ""])


def test_hit_rates_are_those_of_the_simulation():
    assert between("hit rates", "end of hit rates") == hit_rates()


def test_servers_hit_as_exact_lru_does_but_for_what_the_page_says():
    path = ROOT / "bench" / "results" / "traces" / "server.jsonl"
    rates = {}
    for one in map(json.loads, path.read_text().splitlines()):
        rates[(*one["params"].values(), one["variant"])] = one["median"]
    assert len(rates) == 4 * 2 * 2 * 4  # traces, shares, batches, rates
    worst = {
        of: min(
            100 * (rate - rates[(*at, f"{of}, exact LRU")])
            for (*at, variant), rate in rates.items()
            if variant == of
        )
        for of in ("per occurrence", "per unique key")
    }
    text = " ".join(PAGE.split())
    assert f"at worst {-worst['per occurrence']:.1f} points below exact LRU" in text
    assert f"and {-worst['per unique key']:.1f} per unique key" in text


@pytest.mark.parametrize("page", [PAGE, OPERATIONS], ids=["gpu", "operations"])
def test_places_for_all_rows_take_what_the_page_says(page):
    slots = {f"{28 * sets_for_all(n) / n:.3f}" for n in (10**6, 10**7, 10**8)}
    assert [f"{each} slots a row" in page for each in slots] == [True]


def test_a_slot_takes_what_the_page_says():
    shapes = [
        (16, "float32"),
        (32, "float32"),
        (64, "float32"),
        (128, "float32"),
        (128, "float16"),
    ]
    table = TableLayout.for_rows(2_000_000)
    bytes_a_slot = [
        CacheLayout(RowLayout(dim, stored), (table,)).n_bytes / table.n_slots
        for dim, stored in shapes
    ]
    head = " | ".join(f"{dim}, {stored}" for dim, stored in shapes)
    line = " | ".join(f"{n:.1f}" for n in bytes_a_slot)
    assert f"| dim, stored as | {head} |" in PAGE
    assert f"| bytes a slot, 2,000,000 slots | {line} |" in PAGE


def test_the_example_of_buffers_adds_up():
    params = InferenceParams(
        model_name="m",
        embedding_table_names=["user", "item"],
        embedding_vecsize_per_table=[64, 64],
        maxnum_catfeature_query_per_table_per_sample=[2, 50],
        default_value_for_each_table=[0, 0],
        max_batchsize=1024,
        cache_size_percentage=0.2,
        use_gpu_embedding_cache=True,
    )
    cache = plan_cache(params, [1_000_000, 10_000_000])
    (lane,), staging = lane_layouts(cache, 65_536)
    n_slots = sum(cache.n_slots(spec.tag) for spec in params.tables())
    figures = {
        f"cache, {n_slots:,} slots": cache.n_bytes,
        f"workspace of {lane.n_keys:,} keys": lane.device_bytes,
        f"a block of {staging.n_rows:,} rows": staging.n_bytes,
        "buffers of 1 lookup at a time": buffer_bytes(cache, 65_536, 1).device,
        "buffers of 4 lookups at a time": buffer_bytes(cache, 65_536, 4).device,
        "buffers of 4, `max_batch_size` 8,192": buffer_bytes(cache, 8192, 4).device,
    }
    lines = ["| part | bytes |", "|---|---|"]
    lines += [f"| {part} | {n_bytes:,} |" for part, n_bytes in figures.items()]
    assert between("example", "end of example").splitlines() == lines


def test_a_key_of_a_workspace_takes_44_to_60_bytes():
    for n_keys in (*range(10_000, 100_000, 997), 1 << 20, (1 << 20) + 1):
        assert 44 <= LaneLayout(n_keys, 1).device_bytes / n_keys < 60.1


def test_goals_are_those_of_the_benchmark():
    rates = [
        f"| look-ups a second, dim {dim} | {rate / 1e9:g} billion |"
        for dim, rate in plan.RATE_GOALS.items()
    ]
    others = [
        f"| against the fastest plain gather of the same rows | {plan.GATHER_GOAL:g} |",
        f"| inserts a second, against look-ups | {plan.INSERT_GOAL:g} |",
        f"| host time of a call, {plan.FULL.small_keys:,} keys "
        f"| {plan.CALL_GOAL_S * 1e6:g} µs |",
        f"| the same until the rows are there | {plan.DONE_GOAL_S * 1e6:g} µs |",
    ]
    assert between("goals", "end of goals").splitlines()[2:] == rates + others


def test_the_report_knows_every_marker_of_the_page():
    markers = [match[2] for match in MARKED.finditer(PAGE)]
    assert "query" in markers
    assert set(markers) <= set(SECTIONS)
