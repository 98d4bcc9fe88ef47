"""The intake of tasks, and changes to stored ones: submit, map, cancel, requeue, delete, dead letters.

``Queue`` calls it; it calls down into running, where a started node buffers what is new.
"""
