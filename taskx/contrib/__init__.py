"""Skins for programs that others wrote; each needs an extra of its own.

A skin holds no rules. It imports what ``taskx`` exports, and as internal API two modules:
``storage.queries``, for questions about all tasks, and ``common.permission``, which tells the child process
of an executor. Users import a skin; nothing in TaskX does.
"""
