"""The order of accesses that kernels' PTX keeps, on every path through it.

What a path is comes from labels and branches alone: each branch may go either way, so
that a path may be impossible, and never one overlooked. Instructions are matched by
their text. This shows that a fence, an acquire, a release or a barrier is there and
where; whether those suffice is what the races in a weak memory show.

What it does not see: that the same set is meant (addresses are compared as registers),
that a lock that was taken is let go again, and what the assembler makes of the text
afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from hps_numba.kernels.cuda.compiling import KernelSpec, compile_ptx

CAPABILITY = (9, 0)

FENCE = r"fence\.acq_rel\.gpu;"
WARP_BARRIER = r"bar\.warp\.sync"
SHUFFLE = r"shfl\.sync"
ROW_LOAD = r"ld\.relaxed\.gpu\.global\.L1::no_allocate"
LOCK = r"atom\.acquire\.gpu\.global\.cas\.b32"
UNLOCK = r"st\.release\.gpu\.global\.u32"
STORE = r"st\.relaxed\.gpu\.global"
FIRST_LOOK = r"ld\.acquire\.gpu\.global\.(v4\.u32 \{[^}]*\}|u32 %\w+), \[(%\w+)\]"

_LABEL = re.compile(r"^(\$\w+):")
_BRANCH = re.compile(r"^(@!?%\w+\s+)?bra(?:\.uni)?\s+(\$\w+);")
_ACCESS = re.compile(r"\b(?:ld|st|atom|red)\.(?!param|const)[\w.:]+")


@dataclass(frozen=True)
class Flow:
    """A kernel's instructions, and which of them may follow which."""

    lines: tuple[str, ...]

    @staticmethod
    def of(spec: KernelSpec) -> Flow:
        """Return the flow of a kernel."""
        text = compile_ptx(spec, CAPABILITY)
        body = text[text.index("{", text.index(".entry")) + 1 : text.rindex("}")]
        lines = (line.strip() for line in body.splitlines())
        kept = tuple(line for line in lines if line and not line.startswith((".", "/")))
        return Flow(kept)

    @cached_property
    def _following(self) -> list[tuple[int, ...]]:
        labels = {
            found[1]: i
            for i, line in enumerate(self.lines)
            if (found := _LABEL.match(line))
        }
        following = []
        for i, line in enumerate(self.lines):
            after = (i + 1,) if i + 1 < len(self.lines) else ()
            if branch := _BRANCH.match(line):
                target = labels[branch[2]]
                after = (*after, target) if branch[1] else (target,)
            elif line.startswith("ret"):
                after = ()
            else:
                assert not re.search(r"\b(bra|brx|call|exit|ret)\b", line), line
            following.append(after)
        return following

    def places(self, pattern: str) -> list[int]:
        """Return where instructions are whose text has a pattern."""
        return [i for i, line in enumerate(self.lines) if re.search(pattern, line)]

    def reached(self, starts: Iterable[int], but_through: str) -> set[int]:
        """Return what follows on paths that do not pass ``but_through``."""
        seen: set[int] = set()
        left = [after for start in starts for after in self._following[start]]
        while left:
            i = left.pop()
            if i not in seen:
                seen.add(i)
                if not re.search(but_through, self.lines[i]):
                    left += self._following[i]
        return seen

    def check_between(self, first: str, last: str, wanted: str) -> None:
        """Fail if a path leads from ``first`` to ``last`` that misses ``wanted``."""
        starts, ends = self.places(first), self.places(last)
        assert starts, f"no /{first}/"
        assert ends, f"no /{last}/"
        bare = self.reached(starts, wanted) & set(ends)
        assert not bare, (
            f"{self.lines[min(bare)]!r} may follow /{first}/ without /{wanted}/"
        )

    def accesses(self) -> set[str]:
        """Return the forms of the accesses to global memory."""
        found = (_ACCESS.search(line) for line in self.lines)
        return {re.sub(r"\.(v\d\.)?[ub]\d+$", "", one[0]) for one in found if one}


def second_look(flow: Flow) -> str:
    """Return the pattern of a reader's second look at a set's number."""
    first = flow.places(FIRST_LOOK)
    assert first, "no number of a set is loaded with acquire"
    address = {re.search(FIRST_LOOK, flow.lines[i])[2] for i in first}  # type: ignore[index]
    assert len(address) == 1
    again = rf"ld\.relaxed\.gpu\.global\.u32 %\w+, \[{re.escape(address.pop())}\]"
    assert flow.places(again), "no number of a set is loaded again"
    return again


def check_reader(flow: Flow) -> None:
    """Check a kernel that copies rows: look, copy, fence, wait for all lanes, look."""
    again = second_look(flow)
    flow.check_between(ROW_LOAD, again, FENCE)
    flow.check_between(FENCE, again, WARP_BARRIER)


def check_dump(flow: Flow) -> None:
    """Check a kernel that reads keys: look, read, fence, look."""
    again = second_look(flow)
    for read in (r"ld\.relaxed\.gpu\.global\.u8", r"ld\.relaxed\.gpu\.global\.u64"):
        flow.check_between(read, again, FENCE)
        flow.check_between(read, again, SHUFFLE)


def check_writer(flow: Flow, *, n_sets: int = 1) -> None:
    """Check a kernel that changes sets: lock, fence, stores, wait for all, unlock.

    Of two sets either may be the one that is let go, whose address is then another
    register than those of the locks.
    """
    flow.check_between(LOCK, STORE, FENCE)
    flow.check_between(STORE, UNLOCK, WARP_BARRIER)
    flow.check_between(LOCK, UNLOCK, WARP_BARRIER)
    locks = {_address(flow.lines[i]) for i in flow.places(LOCK)}
    unlocks = {_address(flow.lines[i]) for i in flow.places(UNLOCK)}
    assert locks == unlocks if n_sets == 1 else locks & unlocks
    assert len(locks) == n_sets
    for address in locks | unlocks:
        plain = rf"st\.relaxed\.gpu\.global\.u32 \[{re.escape(address)}\]"
        assert not flow.places(plain), "a set's number is stored without release"


def check_last_block(flow: Flow) -> None:
    """Check that who draws the last ticket sees what the others counted."""
    ticket = r"atom\.relaxed\.gpu\.global\.add\.u32"
    block_barrier = r"bar\.sync|barrier\.sync"
    assert flow.places(block_barrier)
    end = flow.reached(flow.places(block_barrier), "never")
    tail = Flow(
        tuple(line if i in end else "nop;" for i, line in enumerate(flow.lines))
    )
    flow.check_between(block_barrier, ticket, FENCE)
    tail.check_between(ticket, r"ld\.relaxed|st\.relaxed", FENCE)


def _address(line: str) -> str:
    found = re.search(r"\[(%\w+)\]", line)
    assert found, line
    return found[1]
