"""Limits on how many tasks of a type may start: slots and token buckets, of one node or of all nodes.

Only what fetches and starts tasks asks it.
"""
