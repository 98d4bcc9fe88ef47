"""Measure TaskX, and compare it with a plain loop of its own statements and with similar libraries (peers).

``python -m benchmarks --help`` shows the options. ``docs/performance.rst`` explains the results.
"""
