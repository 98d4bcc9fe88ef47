"""Executors with ``isolation="process"``: the child process, the socket between, and the end of both.

Only the runner calls it.
"""
