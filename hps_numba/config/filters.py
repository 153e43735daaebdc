"""Which topics the ``update_filters`` of a database mean."""

from __future__ import annotations

import re

from hps_numba.types import TAG_PREFIX

_PREFIX = re.escape(TAG_PREFIX)
# An escaped character, a set of characters, or an anchor outside of both.
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\^|\$", re.DOTALL)
_ANCHORS = {"^": rf"(?<=\A{_PREFIX}\.)", "$": r"(?=\.)"}


def topic_pattern(update_filter: str) -> re.Pattern[str]:
    """Return the pattern of the topics that one of ``update_filters`` means.

    A filter may describe a whole topic, ``hps_et.<model>.<table>``, as HugeCTR
    documents it, or the model's name, as HugeCTR's code reads it. Its anchors then hold
    at the ends of the name.

    Raises
    ------
    re.error
        If the filter is not a regular expression, or has flags for the whole of it.
    """
    re.compile(update_filter)
    name = _TOKEN.sub(lambda match: _ANCHORS.get(match[0], match[0]), update_filter)
    return re.compile(
        rf"(?=(?:{update_filter})\Z){_PREFIX}\..+\Z|{_PREFIX}\.(?:{name})\..+\Z"
    )
