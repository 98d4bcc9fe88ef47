"""The tools of every part of a queue: group commit, hooks, handles, pauses, waiting threads.

It knows the storage and nothing of workers or executors. Any package above may use it.
"""
