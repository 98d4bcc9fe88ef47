"""Integrations with other programs; each needs an optional package of its own.

An integration contains no rules. It imports only the public API of ``taskx``, ``taskx.dashboard`` and
``taskx.cli.app``, and one internal module: ``common.permission``, to recognise the child process of an
executor. Type checkers also see the types of options. Users import an integration; nothing in TaskX does.
"""
