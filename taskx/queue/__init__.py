"""The class ``Queue`` and what its methods do, by subject: submit, map, change, flows, schedules.

``queue`` connects the parts and holds no rules. A started queue is in ``node``, which is below and knows
nothing of this room.
"""
