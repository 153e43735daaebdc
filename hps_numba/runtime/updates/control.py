"""What users may do with the update streams of a server."""

from __future__ import annotations

from collections.abc import Callable

from hps_numba.runtime.updates.consumer import UpdateConsumer
from hps_numba.runtime.updates.source import KafkaSource
from hps_numba.runtime.updates.stats import UpdateStats

TagOf = Callable[[str, "int | str"], str]


class Updates:
    """The update streams of a server; ``HPS.updates``. Thread-safe.

    Parameters
    ----------
    consumer, source
        What reads the streams.
    tag_of
        Returns the tag of a table that is served, or raises ``UnknownTableError``.

    Notes
    -----
    Methods raise ``ClosedError`` once the server is closed.
    """

    def __init__(
        self, consumer: UpdateConsumer, source: KafkaSource, tag_of: TagOf
    ) -> None:
        self._consumer = consumer
        self._source = source
        self._tag_of = tag_of

    def start(self) -> None:
        """Begin to follow; the server does it when its tables are loaded."""
        self._consumer.start()

    def look_soon(self) -> None:
        """Look for new topics before metadata_refresh_interval_ms have passed."""
        self._consumer.look_soon()

    def close(self) -> None:
        """End; the second call does nothing."""
        self._consumer.close()

    def pause(self, model: str | None = None, table: int | str | None = None) -> None:
        """Apply nothing more until ``resume``.

        Parameters
        ----------
        model, table
            Of one table; all streams if both are None.
        """
        self._consumer.pause(self._topic(model, table))

    def resume(self, model: str | None = None, table: int | str | None = None) -> None:
        """Go on where ``pause`` stopped."""
        self._consumer.resume(self._topic(model, table))

    def seek(
        self,
        model: str,
        table: int | str,
        *,
        offset: int | None = None,
        time_s: float | None = None,
        partition: int | None = None,
    ) -> None:
        """Go on from another place in a table's stream, back or forth.

        Going back applies old records again, in order: until the stream has caught up,
        lookups may see rows that are older than they were. What is skipped forwards is
        not applied. Databases that servers share go back and forth for all of them.

        Parameters
        ----------
        model, table
            The table.
        offset
            Of the next message, in every partition that is asked for.
        time_s
            Go on with the first message of this Unix time, in seconds, or later.
        partition
            One partition of the stream; all if None.

        Raises
        ------
        TypeError
            If not just one of ``offset`` and ``time_s`` is given.
        ValueError
            If offset or time is negative.
        UpdateSourceError
            If there is no such partition, or the brokers do not tell which offset a
            time is.
        TierError
            If a database cannot store the position.
        """
        if (offset is None) == (time_s is None):
            raise TypeError("seek takes either offset or time_s")
        if (offset or 0) < 0 or (time_s or 0) < 0:
            raise ValueError("offset and time_s of seek are at least 0")

        def where(topic: str, number: int) -> int:
            if time_s is not None:
                return self._source.offset_at(topic, number, int(time_s * 1e3))
            assert offset is not None
            return offset

        self._consumer.seek(self._tag_of(model, table), partition, where)

    def catch_up(self, timeout_s: float = 30.0) -> bool:
        """Wait until all is applied that is in the streams now.

        Returns
        -------
        bool
            Whether it is; False if the time ran out, or a stream is paused or stopped.

        Raises
        ------
        UpdateSourceError
            If no broker answers.
        TierError
            If a database cannot tell how far it is.
        """
        return self._consumer.catch_up(timeout_s)

    def stats(self) -> UpdateStats:
        """Return how far the streams are, and what became of their messages."""
        return self._consumer.stats()

    def _topic(self, model: str | None, table: int | str | None) -> str | None:
        if model is None and table is None:
            return None
        if model is None or table is None:
            raise TypeError("one table is named by a model and a table")
        return self._tag_of(model, table)
