"""Integrations with other programs; each needs an optional package of its own.

An integration contains no rules. It imports only the public API of ``taskx`` and one internal module:
``common.permission``, to recognise the child process of an executor. Users import an integration; nothing
in TaskX does.
"""
