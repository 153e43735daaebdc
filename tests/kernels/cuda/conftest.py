from __future__ import annotations

from typing import Any

from tests.kernels.cuda.checked import FIGURES


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many keys each kernel had on the CPU, and how fast."""
    if not FIGURES:
        return
    terminalreporter.section("kernels on the CPU: keys compared with the oracle")
    for (kernel, rows), (n_keys, cpu_s) in sorted(FIGURES.items()):
        rate = n_keys / cpu_s if cpu_s else 0.0
        terminalreporter.write_line(
            f"{kernel:<15} {rows:<20} {n_keys:>9.0f} keys {rate:>10.0f} keys/s"
        )
