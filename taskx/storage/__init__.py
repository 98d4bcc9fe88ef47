"""Where tasks are kept: the interface, and the repositories that come with TaskX.

A repository knows no rules: it applies guarded writes and answers a few questions. What needs more asks
``queries``.
"""
