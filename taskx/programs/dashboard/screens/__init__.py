"""The screens of the dashboard, in the order of the navigation.

Each module has the pages and the actions of one screen, and names them in its ``SCREEN``.
"""

from taskx.programs.dashboard.pages import Screen
from taskx.programs.dashboard.screens import (
    answers,
    failures,
    flows,
    nodes,
    overview,
    schedules,
    system,
    task,
    tasks,
    types,
)

#: All screens.
SCREENS: tuple[Screen, ...] = (
    overview.SCREEN,
    tasks.SCREEN,
    task.SCREEN,
    failures.SCREEN,
    answers.SCREEN,
    flows.SCREEN,
    schedules.SCREEN,
    types.SCREEN,
    nodes.SCREEN,
    system.SCREEN,
)
