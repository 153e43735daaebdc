"""Benchmarks: interleaved comparisons in one run, results as JSON lines.

``python -m bench`` runs them, ``bench/report.py`` writes ``docs/benchmarks.md``.
"""
