"""Stores of tasks: the interface, and the repositories that come with TaskX.

A repository knows no rules: it applies guarded writes and answers a few queries. Questions that need
several of these are in ``queries``. ``liveness`` knows which nodes are alive.
"""
