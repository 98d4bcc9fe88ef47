"""The tools of all parts of a queue: group commit, hooks, handles, pauses, waiting threads.

This package uses the storage, and knows nothing of workers or executors. All packages above may use it.
"""
