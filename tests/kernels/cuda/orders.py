"""In which order the inserts of a launch came.

Warps that meet in one set come in any order. A launch is right if one order of a set's
keys leads the oracle to what was seen: outcomes, evicted keys, and the set afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hps_numba.kernels.cuda.layout import Outcome
from tests.kernels.cuda.hashes import door_of
from tests.kernels.cuda.oracle import OracleTable, Set


@dataclass
class Inserts:
    """One launch of inserts into one table, and what was seen of it.

    ``seen`` are the sets afterwards, ``door`` the doorkeeper's entries.
    """

    keys: list[int]
    rows: list[bytes]
    epoch: int
    admit: bool
    outcomes: list[int]
    evicted: list[int]
    seen: dict[int, Set]
    door: list[int]

    def groups(self, table: OracleTable) -> Iterator[list[int]]:
        """Yield positions that may depend on each other: by set, and by door entry."""
        parent: dict[Any, Any] = {}

        def root(node: Any) -> Any:
            while parent.setdefault(node, node) != node:
                node = parent[node]
            return node

        wanted = [i for i, what in enumerate(self.outcomes) if what != Outcome.SKIPPED]
        for i in wanted:
            a = root(("set", table.set_of(self.keys[i])))
            if self.admit:
                parent[root(("door", door_of(self.keys[i], len(table.door))))] = a
        groups: dict[Any, list[int]] = {}
        for i in wanted:
            place = root(("set", table.set_of(self.keys[i])))
            groups.setdefault(place, []).append(i)
        yield from groups.values()


def explain(table: OracleTable, inserts: Inserts) -> list[int] | None:
    """Apply inserts in an order that leads to what was seen; None if there is none."""
    order: list[int] = []
    for group in inserts.groups(table):
        found = _Search(table, inserts, group).run()
        if found is None:
            return None
        order += found
    for i in order:
        table.count(Outcome(inserts.outcomes[i]))
    return order


class _Search:
    """Depth-first search for an order, with the table as its scratch pad."""

    def __init__(self, table: OracleTable, inserts: Inserts, group: list[int]) -> None:
        self.table, self.inserts = table, inserts
        self.left = list(group)
        self.gone = {
            inserts.evicted[i] for i in group if inserts.outcomes[i] == Outcome.EVICTED
        }
        self.times = Counter(inserts.keys[i] for i in group)
        self.done: list[tuple[int, Any]] = []

    def run(self) -> list[int] | None:
        untried = [self._candidates()]
        while untried:
            step = next(untried[-1], None)
            if step is None:
                untried.pop()
                if self.done:
                    self._undo()
            else:
                untried.append(self._candidates())
                if not self.left and self._is_as_seen():
                    return [i for i, _ in self.done]
        return None

    def _candidates(self) -> Iterator[int]:
        """Yield each position that may be next, with its insert applied."""
        tried: set[Any] = set()
        for i in list(self.left):
            saved = self._save(i)
            before = self.table.sets[self.table.set_of(self.inserts.keys[i])].seq
            if not self._apply(i):
                self._restore(saved)
                continue
            kind = self._kind(i)
            if kind in tried:
                self._restore(saved)
                continue
            if kind is not None:
                tried.add(kind)
            self.left.remove(i)
            self.done.append((i, saved))
            idle = self.table.sets[self.table.set_of(self.inserts.keys[i])].seq
            yield i
            # What changes nothing may as well come now: no need to try others.
            if idle == before and self.inserts.outcomes[i] != Outcome.TURNED_AWAY:
                return

    def _apply(self, i: int) -> bool:
        given, key = self.inserts, self.inserts.keys[i]
        outcome, gone = self.table.insert(
            key, given.rows[i], epoch=given.epoch, admit=given.admit
        )
        if outcome != given.outcomes[i]:
            return False
        if gone is not None and gone != given.evicted[i]:
            return False
        if outcome in (Outcome.INSERTED, Outcome.EVICTED) and key not in self.gone:
            n_set = self.table.set_of(key)
            return self.table.sets[n_set].way_of(key) == given.seen[n_set].way_of(key)
        return True

    def _kind(self, i: int) -> Any:
        """Return what makes one replaced row as good as another to come next."""
        key = self.inserts.keys[i]
        alone = self.times[key] == 1 and key not in self.gone
        replaced = self.inserts.outcomes[i] == Outcome.REPLACED
        return self.table.set_of(key) if alone and replaced else None

    def _is_as_seen(self) -> bool:
        sets = {self.table.set_of(self.inserts.keys[i]) for i, _ in self.done}
        entries = (
            {door_of(self.inserts.keys[i], len(self.table.door)) for i, _ in self.done}
            if self.inserts.admit
            else set()
        )
        return all(
            self.table.sets[n_set] == self.inserts.seen[n_set] for n_set in sets
        ) and all(
            self.table.door[entry] == self.inserts.door[entry] for entry in entries
        )

    def _save(self, i: int) -> Any:
        key = self.inserts.keys[i]
        n_set = self.table.set_of(key)
        entry = door_of(key, len(self.table.door)) if self.table.door else None
        mark = None if entry is None else self.table.door[entry]
        return n_set, self.table.sets[n_set].copy(), entry, mark

    def _restore(self, saved: Any) -> None:
        n_set, one, entry, mark = saved
        self.table.sets[n_set] = one
        if entry is not None:
            self.table.door[entry] = mark

    def _undo(self) -> None:
        i, saved = self.done.pop()
        self.left.append(i)
        self._restore(saved)
