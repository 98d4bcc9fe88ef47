"""Limits on the starts of tasks of a type: slots and token buckets, of one node or of all nodes.

Only the code that fetches and starts tasks uses it.
"""
