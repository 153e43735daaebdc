"""The compile gate: what kernels take, read from their machine code without a GPU.

``python -m tests.support.gate`` compiles every kernel in every shape of ``gate_cases``
for every supported compute capability, prints a table of what each takes, and fails if
one is over its limit. ``--json PATH`` writes a line per kernel as well, ``--part I/N``
takes every N-th shape only, so that several processes share the work.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cuda import pathfinder

from hps_numba.kernels.cuda.compiling import Cubin, compile_cubin
from hps_numba.kernels.cuda.limits import CAPABILITIES, LIMITS, Limit, kind_of
from tests.support.gate_cases import Case, cases

INSTALL = "nvdisasm is missing: pip install 'nvidia-cuda-nvdisasm>=13,<14'"

SYSTEM_SHARED_BYTES = 1024

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([^;]*?)\s*;")
_GLOBAL = re.compile(r"(LDG|STG)\.\S*")
_WIDTH = re.compile(r"\.(128|64|[US]?16|[US]?8)\b")
# Where the compiler cannot prove that a warp is together, shuffles and votes get a
# second version out of line, for warps that are not.
_COLLECTIVE = re.compile(r"CALL\S* `\(__cuda_sm70_\w*sync\w*\)|WARPSYNC\.COLLECTIVE")

FORBIDDEN = {
    "local memory": r"(LDL|STL)\b",
    "generic load": r"LD\b",
    "generic store": r"ST\b",
    "generic atomic": r"ATOM\b",
    # To a label of the kernel's own it is how the compiler leaves some loops.
    "call": r"CALL\b(?!.*`\(\.L)",
    "float64": r"D(ADD|MUL|FMA|SETP|MNMX)\b|\S*\.F64\b|MUFU\.\w*64",
}


@dataclass(frozen=True)
class Report:
    """What one kernel takes on one compute capability."""

    kernel: str
    cc: tuple[int, int]
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    instructions: int
    loads: dict[int, int]
    stores: dict[int, int]
    fences: int
    collectives: int
    forbidden: dict[str, int]


def disassemble(cubin: Cubin) -> list[str]:
    """Return the instructions of a cubin, without predicates and padding."""
    tool = pathfinder.find_nvidia_binary_utility("nvdisasm")
    if tool is None:
        raise FileNotFoundError(INSTALL)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin.code)
        file.flush()
        text = subprocess.run(
            [tool, "-c", "-ndf", file.name], check=True, capture_output=True, text=True
        ).stdout
    return [found for found in _INSTRUCTION.findall(text) if found != "NOP"]


def inspect(cubin: Cubin) -> Report:
    """Read what a kernel takes from its machine code and its assembler's log."""
    instructions = disassemble(cubin)
    inline = [one for one in instructions if not _COLLECTIVE.match(one)]
    forbidden = {
        what: sum(bool(re.match(pattern, one)) for one in inline)
        for what, pattern in FORBIDDEN.items()
    }
    return Report(
        kernel=cubin.name,
        cc=cubin.cc,
        registers=_logged(cubin, r"Used (\d+) registers"),
        stack_bytes=_logged(cubin, r"(\d+) bytes stack frame"),
        spill_bytes=_logged(cubin, r"(\d+) bytes spill stores")
        + _logged(cubin, r"(\d+) bytes spill loads"),
        shared_bytes=shared_bytes(cubin),
        instructions=len(instructions),
        loads=_widths(instructions, "LDG"),
        stores=_widths(instructions, "STG"),
        fences=sum(one.startswith("MEMBAR") for one in instructions),
        collectives=len(instructions) - len(inline),
        forbidden={what: n for what, n in forbidden.items() if n},
    )


def shared_bytes(cubin: Cubin) -> int:
    """Return the static shared memory of a block.

    The log does not know it, as the linker lays it out after the assembler. It is the
    size of an ELF section, which from capability 9.0 on begins with the system's part.
    """
    code = cubin.code
    (table,) = struct.unpack_from("<Q", code, 40)
    entry_bytes, n_sections, names_at = struct.unpack_from("<HHH", code, 58)
    sections = [
        struct.unpack_from("<IIQQQQ", code, table + i * entry_bytes)
        for i in range(n_sections)
    ]
    names, wanted = sections[names_at][4], f".nv.shared.{cubin.name}\0".encode()
    for name, _, _, _, _, n_bytes in sections:
        if code.startswith(wanted, names + name):
            return n_bytes - (SYSTEM_SHARED_BYTES if cubin.cc >= (9, 0) else 0)
    return 0


def _logged(cubin: Cubin, pattern: str) -> int:
    found = re.search(pattern, cubin.log)
    assert found, f"no /{pattern}/ in the log of {cubin.name}:\n{cubin.log}"
    return int(found[1])


def _widths(instructions: Iterable[str], kind: str) -> dict[int, int]:
    """Count the global loads or stores by their width in bits, widest first."""
    counts: Counter[int] = Counter()
    for one in instructions:
        found = _GLOBAL.match(one)
        if found and found[1] == kind:
            width = _WIDTH.search(found[0])
            counts[int(width[1].lstrip("US")) if width else 32] += 1
    return dict(sorted(counts.items(), reverse=True))


def violations(report: Report, limit: Limit, case: Case) -> list[str]:
    """Return in what a kernel is over its limit, a line each."""
    over = [
        f"{n} {what} > {most}"
        for what, n, most in (
            ("registers", report.registers, limit.registers),
            ("instructions", report.instructions, limit.instructions),
            ("bytes of shared memory", report.shared_bytes, limit.shared_bytes),
            ("bytes of stack", report.stack_bytes, 0),
            ("bytes of spills", report.spill_bytes, 0),
        )
        if n > most
    ]
    for what, counts, n_bytes, least in (
        ("loads", report.loads, case.load_bytes, limit.row_loads),
        ("stores", report.stores, case.store_bytes, limit.row_stores),
    ):
        n, wanted = counts.get(8 * n_bytes, 0), min(least, case.units)
        if n < wanted:
            over.append(f"{n} {what} of {8 * n_bytes} bits < {wanted}")
    return over + [f"{what}: {n} instructions" for what, n in report.forbidden.items()]


def check(case: Case) -> list[tuple[Report, list[str]]]:
    """Compile one kernel for every compute capability and hold it to its limit."""
    limit = LIMITS[kind_of(case.spec.name)]
    reports = [inspect(compile_cubin(case.spec, cc)) for cc in CAPABILITIES]
    return [(report, violations(report, limit, case)) for report in reports]


def table(reports: Iterable[Report]) -> str:
    """Return the reports as a markdown table."""
    lines = [
        "| kernel | cc | registers | instructions | loads | stores | fences "
        "| collectives out of line | shared | stack | spills | forbidden |",
        "|---|--:|--:|--:|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for report in reports:
        cells = (
            report.kernel,
            "{}.{}".format(*report.cc),
            report.registers,
            report.instructions,
            _counts(report.loads),
            _counts(report.stores),
            report.fences,
            report.collectives,
            report.shared_bytes,
            report.stack_bytes,
            report.spill_bytes,
            ", ".join(report.forbidden) or "none",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _counts(widths: dict[int, int]) -> str:
    return ", ".join(f"{n} x {width}" for width, n in widths.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the gate; return how many kernels are over a limit."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.gate")
    parser.add_argument("--json", type=Path, help="also write a line per kernel here")
    parser.add_argument(
        "--part", default="0/1", help="I/N: every N-th shape from the I-th"
    )
    parser.add_argument("--kernel", default="", help="only kernels whose name has this")
    options = parser.parse_args(arguments)
    part, n_parts = map(int, options.part.split("/"))
    chosen = [case for case in cases() if options.kernel in case.spec.name]
    results = [result for case in chosen[part::n_parts] for result in check(case)]
    print(table(report for report, _ in results))
    if options.json:
        lines = [
            json.dumps({**dataclasses.asdict(report), "over": over})
            for report, over in results
        ]
        options.json.write_text("\n".join(lines) + "\n")
    bad = [(report, over) for report, over in results if over]
    for report, over in bad:
        print(f"{report.kernel} {report.cc}: {'; '.join(over)}", file=sys.stderr)
    return len(bad)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
