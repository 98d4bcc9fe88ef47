"""A node at work: the buffer, the worker threads, and the way of a task from its start to its outcome.

Submitting puts tasks into the buffer; upkeep starts, refills and stops it.
"""
