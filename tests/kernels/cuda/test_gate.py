"""Every kernel keeps its limits, and the gate sees what it forbids."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda import pathfinder
from numba import cuda

from hps_numba.kernels.cuda import ptx
from hps_numba.kernels.cuda.compiling import Cubin, KernelSpec, compile_cubin
from hps_numba.kernels.cuda.limits import CAPABILITIES, LIMITS, Limit, kind_of
from tests.support import gate
from tests.support.gate_cases import Case, cases

N_PROCESSES = 2
LOOSE = Limit(registers=255, instructions=10_000, shared_bytes=1 << 16)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the gate's own command says of every kernel, from processes side by side."""
    folder = tmp_path_factory.mktemp("gate")
    paths = [folder / f"{part}.jsonl" for part in range(N_PROCESSES)]
    runs = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.support.gate"),
                *("--part", f"{part}/{N_PROCESSES}", "--json", str(path)),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for part, path in enumerate(paths)
    ]
    errors = [run.communicate()[1] for run in runs]
    for run, path, error in zip(runs, paths, errors, strict=True):
        assert path.exists(), error
        assert run.returncode in (0, 1), error
    return [
        json.loads(line) for path in paths for line in path.read_text().splitlines()
    ]


def test_every_kernel_keeps_its_limits(results: list[dict[str, Any]]) -> None:
    over = [
        f"{one['kernel']} {one['cc']}: {'; '.join(one['over'])}"
        for one in results
        if one["over"]
    ]
    assert over == []


def test_every_kernel_was_looked_at_on_every_capability(
    results: list[dict[str, Any]],
) -> None:
    seen = {(one["kernel"], tuple(one["cc"])) for one in results}
    assert seen == {(case.spec.name, cc) for case in cases() for cc in CAPABILITIES}
    assert len(seen) == len(results)


def test_every_kind_of_kernel_has_a_limit_and_every_limit_a_kernel() -> None:
    assert {kind_of(case.spec.name) for case in cases()} == set(LIMITS)
    with pytest.raises(KeyError):
        kind_of("unheard_of")
    assert kind_of("pooled_query_float32_3_float32_lru") == "pooled_query"
    assert kind_of("insert_float32_3_static") == "insert_static"
    assert kind_of("update_float32_3_static") == "update"


def test_the_tools_that_the_gate_needs_are_there() -> None:
    assert pathfinder.find_nvidia_binary_utility("nvdisasm"), gate.INSTALL


def test_a_missing_disassembler_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pathfinder, "find_nvidia_binary_utility", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install"):
        gate.disassemble(Cubin("k", b"", (9, 0), ""))


load_row, store_row = ptx.load_row[16], ptx.store_row[2]
store_out = ptx.store_out[4]
generic_load = ptx._load("relaxed.gpu", 32)
generic_store = ptx._store("relaxed.gpu", 32)


def loads_generic(a, b):
    ptx.store_u32(a, generic_load(b))


def stores_generic(a, b):
    generic_store(a, np.uint32(b))


def divides(a, b):
    ptx.store_u64(a, np.uint64(ptx.load_u64(a) // b))


def goes_through_float64(a, b):
    """Numba makes a float64 of the sum of an uint64 and an int64."""
    ptx.store_u64(a, np.uint64(ptx.load_u64(a) / np.uint64(2) + np.int64(b)))


def adds_float64(a, b):
    ptx.store_u32(a, np.uint32(float(ptx.load_u32(a)) * 1.5 + float(ptx.load_u32(b))))


def uses_local_memory(a, b):
    words = cuda.local.array(64, np.uint32)
    for i in range(64):
        words[i] = ptx.load_u32(a + np.uint64(4 * i))
    ptx.store_u32(b, words[ptx.load_u32(b) & np.uint32(63)])


def uses_shared_memory(a, b):
    words = cuda.shared.array(256, np.uint32)
    words[cuda.threadIdx.x] = ptx.load_u32(a)
    cuda.syncthreads()
    ptx.store_u32(b, words[cuda.threadIdx.x ^ 1])


def holds_many(a, b):
    """Forty words that live from the first load to the last store."""
    words = cuda.local.array(40, np.uint32)
    for i in range(40):
        words[i] = ptx.load_u32(a + np.uint64(4 * i))
    for i in range(40):
        ptx.store_u32(b + np.uint64(4 * i), words[39 - i])


def copies_words(a, b):
    quad = load_row(a)
    store_out(b, quad[0])
    store_out(b + np.uint64(4), quad[1])
    store_out(b + np.uint64(8), quad[2])
    store_out(b + np.uint64(12), quad[3])


def report(
    function: Callable[..., None], cc: tuple[int, int] = (9, 0), **options: Any
) -> gate.Report:
    spec = KernelSpec(function.__name__, function, "UU", **options)
    return gate.inspect(compile_cubin(spec, cc))


@pytest.mark.parametrize("cc", CAPABILITIES)
@pytest.mark.parametrize(
    ("function", "what"),
    [
        (loads_generic, "generic load"),
        (stores_generic, "generic store"),
        (divides, "call"),
        (goes_through_float64, "float64"),
        (adds_float64, "float64"),
        (uses_local_memory, "local memory"),
    ],
)
def test_what_is_forbidden_is_seen(
    function: Callable[..., None], what: str, cc: tuple[int, int]
) -> None:
    found = report(function, cc)
    assert what in found.forbidden
    over = gate.violations(found, LOOSE, Case(KernelSpec("k", function, "UU")))
    assert any(line.startswith(what) for line in over)


def test_a_spill_is_seen() -> None:
    free, tight = report(holds_many), report(holds_many, max_registers=24)
    case = Case(KernelSpec("k", holds_many, "UU"))
    assert free.registers > 40
    assert gate.violations(free, LOOSE, case) == []
    assert tight.registers <= 24
    assert tight.spill_bytes > 0
    lines = gate.violations(tight, LOOSE, case)
    assert any("bytes of spills > 0" in line for line in lines)
    assert any("local memory" in line for line in lines)


@pytest.mark.parametrize("cc", CAPABILITIES)
def test_shared_memory_is_seen(cc: tuple[int, int]) -> None:
    assert report(uses_shared_memory, cc).shared_bytes == 1024
    assert report(copies_words, cc).shared_bytes == 0


def test_too_much_of_anything_is_seen() -> None:
    found = report(uses_shared_memory)
    case = Case(KernelSpec("k", uses_shared_memory, "UU"))
    assert gate.violations(found, LOOSE, case) == []
    tight = Limit(registers=1, instructions=1)
    assert gate.violations(found, tight, case) == [
        f"{found.registers} registers > 1",
        f"{found.instructions} instructions > 1",
        "1024 bytes of shared memory > 0",
    ]


def test_narrow_stores_in_place_of_wide_ones_are_seen() -> None:
    found = report(copies_words)
    assert found.loads == {128: 1}
    assert found.stores == {32: 4}
    spec = KernelSpec("k", copies_words, "UU")
    case = Case(spec, load_bytes=16, store_bytes=16, units=1)
    limit = dataclasses.replace(LOOSE, row_loads=1, row_stores=1)
    assert gate.violations(found, limit, case) == ["0 stores of 128 bits < 1"]
    more = dataclasses.replace(limit, row_loads=4, row_stores=0)
    several = dataclasses.replace(case, units=3)
    assert gate.violations(found, more, several) == ["1 loads of 128 bits < 3"]


def test_a_fence_and_every_width_are_counted() -> None:
    def everything(a, b):
        quad = ptx.load_quad(a)
        ptx.fence()
        ptx.store_u8(b, quad[0])
        store_row(b + np.uint64(2), np.uint32(quad[1] ^ quad[2] ^ quad[3]))
        ptx.store_u32(b + np.uint64(4), ptx.load_u8(a + np.uint64(32)))
        ptx.store_u64(b + np.uint64(8), ptx.load_u64(a + np.uint64(40)))

    found = report(everything)
    assert found.loads == {128: 1, 64: 1, 8: 1}
    assert found.stores == {64: 1, 32: 1, 16: 1, 8: 1}
    assert found.fences >= 1


def test_the_command_prints_a_table_and_fails_for_what_is_over(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        gate, "cases", lambda: [Case(KernelSpec("two_x", divides, "UU"))]
    )
    monkeypatch.setitem(LIMITS, "two", LOOSE)
    assert gate.main(["--json", str(tmp_path / "out.jsonl")]) == len(CAPABILITIES)
    out, err = capsys.readouterr()
    assert out.count("| two_x |") == len(CAPABILITIES)
    assert "two_x (9, 0): call: 1 instructions" in err
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["over"] for line in lines] == [
        ["call: 1 instructions"]
    ] * 4
    assert gate.main(["--kernel", "nothing"]) == 0
