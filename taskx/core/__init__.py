"""The task, its life cycle, and all rules that need neither threads nor a repository.

Every other package may import this one. ``lifecycle`` is the only module that knows the moves.
"""
