"""What a process has open."""

from __future__ import annotations

import os


def open_sockets() -> int:
    """Return how many sockets this process has."""
    names = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    # The folder's own is closed by now.
    links = [os.readlink(name) for name in names if os.path.lexists(name)]
    return sum(link.startswith("socket:") for link in links)
