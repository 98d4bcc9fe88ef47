"""Schedules: what is stored of them, and the tasks that their ticks make.

``Queue`` and the housekeeper use it.
"""
