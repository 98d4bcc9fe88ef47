"""Skins for programs that others wrote; each needs an extra of its own.

A skin calls public functions and holds no rules. Users import it; nothing in TaskX does.
"""
