"""How fast TaskX is, beside a bare loop of its own statements and beside its peers.

``python -m benchmarks --help`` says how to run it, ``docs/performance.rst`` how to read it.
"""
