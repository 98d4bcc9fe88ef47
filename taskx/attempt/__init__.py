"""One call of an executor: its registration and options, its context, and its ending.

This room knows nothing of worker threads and stores nothing, except checkpoints, and what a run stores in a
transaction of its own.
"""
