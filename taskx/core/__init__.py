"""What a task is, how it lives, and the rules that need no thread and no store.

Every package may use it. ``lifecycle`` is the only module that knows the moves.
"""
