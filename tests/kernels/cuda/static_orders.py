"""In which order the inserts of a launch into a static table came.

No key leaves, so that the keys of a set took its empty ways in the order in which they
came, and what is seen in the end tells that order. What made a key go to one of its two
sets, that the other had become fuller than this one, or that this one had become full,
stays so until the key has come: whoever can come next may as well come next.
"""

from __future__ import annotations

from hps_numba.kernels.cuda.layout import WAYS, Outcome
from tests.kernels.cuda.oracle import OracleTable
from tests.kernels.cuda.orders import Inserts


def explain_static(table: OracleTable, inserts: Inserts) -> bool:
    """Apply inserts in an order that leads to what was seen, if there is one."""
    apply = _Applying(table, inserts)
    if not (apply.newcomers() and apply.others()):
        return False
    for outcome in inserts.outcomes:
        table.count(Outcome(outcome))
    return all(table.sets[n] == one for n, one in inserts.seen.items())


class _Applying:
    """Applies inserts to the table."""

    def __init__(self, table: OracleTable, inserts: Inserts) -> None:
        self.table, self.inserts = table, inserts
        self.places = {
            one.keys[way]: (n_set, way)
            for n_set, one in inserts.seen.items()
            for way in range(WAYS)
            if one.digests[way]
        }

    def newcomers(self) -> bool:
        """Give a place to each key that was not there, if an order leads there."""
        left: dict[int, list[tuple[int, int]]] = {}
        for i, outcome in enumerate(self.inserts.outcomes):
            if outcome == Outcome.INSERTED:
                n_set, way = self.places.get(self.inserts.keys[i], (-1, -1))
                left.setdefault(n_set, []).append((way, i))
        for ways in left.values():
            ways.sort(reverse=True)
        while left:
            before = {n_set: len(ways) for n_set, ways in left.items()}
            for n_set, ways in left.items():
                while ways and self._comes(ways[-1][1], n_set):
                    ways.pop()
            if before == {n_set: len(ways) for n_set, ways in left.items()}:
                return False
            left = {n_set: ways for n_set, ways in left.items() if ways}
        return True

    def _comes(self, i: int, n_set: int) -> bool:
        """Insert a key if it goes to the set where it is seen, which has its way."""
        key = self.inserts.keys[i]
        place = self.table.place_for(key)
        return place == (n_set, None) and self._apply(i)

    def others(self) -> bool:
        """Apply what found its key, no room or a stamp; what is seen comes last."""
        found = [
            i
            for i, outcome in enumerate(self.inserts.outcomes)
            if outcome not in (Outcome.INSERTED, Outcome.SKIPPED)
        ]
        found.sort(key=self._is_as_seen)
        return all(self._apply(i) for i in found)

    def _is_as_seen(self, i: int) -> bool:
        place = self.places.get(self.inserts.keys[i])
        if place is None:
            return False
        n_set, way = place
        return self.inserts.seen[n_set].rows[way] == self.inserts.rows[i]

    def _apply(self, i: int) -> bool:
        given = self.inserts
        outcome, _ = self.table.insert(given.keys[i], given.rows[i], epoch=given.epoch)
        return outcome == given.outcomes[i]
