"""Executors with ``isolation="process"``: the child process, the socket to it, and its end.

Only the runner calls this package.
"""
