"""The intake of tasks, and changes to stored tasks: submit, map, cancel, requeue, delete, dead letters.

``Queue`` uses this package. It calls ``running``, where a started node puts new tasks into its buffer.
"""
