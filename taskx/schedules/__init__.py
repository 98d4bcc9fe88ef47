"""Schedules: their stored form, and the tasks of their ticks.

``Queue`` and the housekeeper use this package.
"""
