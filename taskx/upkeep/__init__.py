"""A started queue from its start to its end, and the housekeeper thread.

Only ``Queue`` uses it.
"""
