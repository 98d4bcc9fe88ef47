"""One call of an executor: its registration and options, its context, and its ending.

This package knows nothing of worker threads and stores nothing, except checkpoints, which commit
through the ledger. The packages that run and submit tasks use it.
"""
