"""Where the reading of a stream partition begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hps_numba.config import UpdateSourceParams
from hps_numba.config.enums import InitialOffset, OffsetReset
from hps_numba.types import Position


@dataclass(frozen=True, slots=True)
class Begin:
    """Where the reading of a stream partition begins.

    Parameters
    ----------
    position
        The first record to apply, or None if ``offset_reset`` is ``stop``; it is not
        read then.
    reset
        Whether this is not where the stored position is: records were lost, or come
        again.
    reason
        Why, for people.
    """

    position: Position | None
    reset: bool
    reason: str


def begin_at(
    params: UpdateSourceParams,
    stored: Position | None,
    low: int,
    end: int,
    *,
    fetch: Callable[[int], int | None],
) -> Begin:
    """Return where to begin.

    Parameters
    ----------
    params
        The configuration.
    stored
        The first record that the tiers lack; None if they have no position.
    low, end
        The offset of the first message and the one after the last, as a broker tells.
        The end may be an older one.
    fetch
        Returns the end as a fetch at an offset tells; None if that is out of range.
    """
    if stored is None:
        latest = params.initial_offset is InitialOffset.LATEST
        return Begin(Position(end if latest else low), False, "no stored position")
    if stored.offset < low:
        reason = f"the stored position {stored} is gone; the first is {low}"
        return _reset(params.offset_reset, low, end, reason)
    # Of a message that was applied in part, the rest must be there.
    needed = stored.offset + (stored.record > 0)
    if needed > end:
        known = fetch(max(needed - 1, low))
        end = end if known is None else known
    if needed > end:
        reason = f"the stored position {stored} is beyond the end, {end}"
        reason += ": the topic was made anew"
        return _reset(params.offset_reset, low, end, reason)
    return Begin(stored, False, "stored position")


def _reset(policy: OffsetReset, low: int, end: int, reason: str) -> Begin:
    if policy is OffsetReset.STOP:
        return Begin(None, True, f"{reason}; stopped")
    offset = low if policy is OffsetReset.EARLIEST else end
    text = f"{reason}; goes on from the {policy.value}, {offset}"
    return Begin(Position(offset), True, text)
