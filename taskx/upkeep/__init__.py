"""A started queue from its start to its end, and the thread that looks after time and other nodes.

Only ``Queue`` uses it.
"""
