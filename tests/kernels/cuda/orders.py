"""In which order the inserts of a launch came.

Warps that meet in one set come in any order. A launch is right if one order of a set's
keys leads the oracle to what was seen: outcomes, evicted keys, and the set afterwards.
For keys of static tables, which have two sets, see ``static_orders``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hps_numba.kernels.cuda.layout import WAYS, Outcome
from tests.kernels.cuda.hashes import door_of
from tests.kernels.cuda.oracle import OracleTable, Set

MOST_IN_VAIN = 20_000  # situations that lead nowhere


@dataclass
class Inserts:
    """One launch of inserts into one table, and what was seen of it.

    ``seen`` are the sets afterwards, ``door`` the doorkeeper's entries.
    """

    keys: list[int]
    rows: list[bytes]
    epoch: int
    admit: bool
    make_room: bool
    outcomes: list[int]
    evicted: list[int]
    seen: dict[int, Set]
    door: list[int]

    def took_a_way(self, i: int) -> bool:
        return self.outcomes[i] in (Outcome.INSERTED, Outcome.EVICTED)

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


def explain(table: OracleTable, inserts: Inserts) -> bool:
    """Apply inserts in an order that leads to what was seen, if there is one."""
    found = all(_Search(table, inserts, group).run() for group in inserts.groups(table))
    if found:
        for outcome in inserts.outcomes:
            table.count(Outcome(outcome))
    return found


@dataclass
class _Saved:
    """What one step of the search changes."""

    position: int | None  # None for a replacement
    n_set: int
    one: Set
    entry: int | None
    mark: int
    spare: int


class _Search:
    """Depth-first search for an order, with the table as its scratch pad.

    Replacements of keys that come once and were there before are all alike: each moves
    its set's number on. So a step says only that there was one; there must have been
    one by the time that the key is evicted. Rows are filled in at the end.
    """

    def __init__(self, table: OracleTable, inserts: Inserts, group: list[int]) -> None:
        self.table, self.inserts = table, inserts
        self.times = Counter(inserts.keys[i] for i in group)
        self.sets = sorted({table.set_of(inserts.keys[i]) for i in group})
        self.replaced = {inserts.keys[i]: i for i in group if self._is_replacement(i)}
        self.left = {i: None for i in group if inserts.keys[i] not in self.replaced}
        # Replacements of each set to come, and those that stand for no key yet.
        self.to_come = Counter(table.set_of(key) for key in self.replaced)
        self.spare: Counter[int] = Counter()
        self.owners = {inserts.keys[i]: i for i in group if inserts.took_a_way(i)}
        self.ways = self._known_ways()
        n_door = len(table.door) or 1
        self.visits = Counter(door_of(inserts.keys[i], n_door) for i in group)
        self.done: list[_Saved] = []
        self.in_vain: set[Any] = set()

    def _is_replacement(self, i: int) -> bool:
        key, table = self.inserts.keys[i], self.table
        return (
            self.inserts.outcomes[i] == Outcome.REPLACED
            and self.times[key] == 1
            and table.find(key) is not None
            and not table.is_stale(key, self.inserts.epoch)
        )

    def _known_ways(self) -> dict[int, int]:
        """Return where keys came to lie, as far as evictions tell, from the end back.

        The last owner of a way is seen there, and who was evicted for it owned the way
        before. Keys that come twice tell nothing.
        """
        known: dict[int, int] = {}
        for n_set in self.sets:
            before, after = self.table.sets[n_set], self.inserts.seen[n_set]
            for way in range(WAYS):
                i = self.owners.get(after.keys[way]) if after.digests[way] else None
                while i is not None and i not in known:
                    if self.times[self.inserts.keys[i]] > 1:
                        break
                    known[i] = way
                    gone = self.inserts.evicted[i]
                    was_first = before.digests[way] and before.keys[way] == gone
                    evicts = self.inserts.outcomes[i] == Outcome.EVICTED
                    i = self.owners.get(gone) if evicts and not was_first else None
        return known

    def run(self) -> bool:
        untried = [self._steps()]
        while untried:
            if len(self.in_vain) > MOST_IN_VAIN:
                raise RuntimeError("too many orders to try; the batch must be smaller")
            if next(untried[-1], None) is None:
                untried.pop()
                self.in_vain.add(self._situation())
                if self.done:
                    self._undo(self.done.pop())
            elif not self.left and not self.to_come.total() and self._is_as_seen():
                return True
            elif self._situation() in self.in_vain:
                self._undo(self.done.pop())
            else:
                untried.append(self._steps())
        return False

    def _situation(self) -> Any:
        """Return what decides whether the rest can be explained."""
        sets = [self.table.sets[n_set] for n_set in self.sets]
        state = [(one.seq, *one.keys, *one.digests, *one.scores) for one in sets]
        twice = len(self.times) < self.times.total()
        rows = [one.rows for one in sets] if twice else None
        door = self.table.door if self.inserts.admit else None
        return frozenset(self.left), hash(repr((state, rows, door)))

    def _steps(self) -> Iterator[bool]:
        """Take each step that may be next, and yield."""
        for i in list(self.left):
            saved = self._save(self.table.set_of(self.inserts.keys[i]), i)
            if not self._apply(i, saved.n_set):
                self._undo(saved)
                continue
            idle = self.table.sets[saved.n_set].seq == saved.one.seq
            if self.inserts.outcomes[i] == Outcome.TURNED_AWAY:
                idle = self.visits[saved.entry] == 1
            del self.left[i]
            self.done.append(saved)
            yield True
            # What changes nothing for others may as well come now.
            if idle:
                return
        for n_set in self.sets:
            if self.to_come[n_set]:
                self.done.append(self._save(n_set, None))
                self.table.sets[n_set].wrote()
                self.to_come[n_set] -= 1
                self.spare[n_set] += 1
                yield True

    def _apply(self, i: int, n_set: int) -> bool:
        given, key = self.inserts, self.inserts.keys[i]
        outcome, gone = self.table.insert(
            key,
            given.rows[i],
            epoch=given.epoch,
            admit=given.admit,
            make_room=given.make_room,
        )
        if outcome != given.outcomes[i]:
            return False
        if outcome == Outcome.EVICTED and gone != given.evicted[i]:
            return False
        if gone in self.replaced:
            self.spare[n_set] -= 1
            if self.spare[n_set] < 0:
                return False
        way = self.table.sets[n_set].way_of(key)
        return self.ways.get(i, way) == way

    def _is_as_seen(self) -> bool:
        for key, i in self.replaced.items():
            place = self.table.find(key)
            if place is not None:
                self.table.sets[place[0]].rows[place[1]] = self.inserts.rows[i]
        if any(self.table.sets[n] != self.inserts.seen[n] for n in self.sets):
            return False
        entries = self.visits if self.inserts.admit else ()
        return all(self.table.door[e] == self.inserts.door[e] for e in entries)

    def _save(self, n_set: int, position: int | None) -> _Saved:
        entry, mark = None, 0
        if position is not None and self.table.door:
            entry = door_of(self.inserts.keys[position], len(self.table.door))
            mark = self.table.door[entry]
        one = self.table.sets[n_set].copy()
        return _Saved(position, n_set, one, entry, mark, self.spare[n_set])

    def _undo(self, saved: _Saved) -> None:
        self.table.sets[saved.n_set] = saved.one
        self.spare[saved.n_set] = saved.spare
        if saved.entry is not None:
            self.table.door[saved.entry] = saved.mark
        if saved.position is None:
            self.to_come[saved.n_set] += 1
        else:
            self.left[saved.position] = None
