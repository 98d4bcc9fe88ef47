"""A node at work: the buffer, the worker threads, and each task's path from its start to its outcome.

``submitting`` puts tasks into the buffer. ``upkeep`` starts, refills and stops the node.
"""
