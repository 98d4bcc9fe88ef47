"""The screens of the dashboard, in the order of the navigation."""

from taskx.dashboard.pages import Screen
from taskx.dashboard.screens import overview, task, tasks

#: All screens.
SCREENS: tuple[Screen, ...] = (overview.SCREEN, tasks.SCREEN, task.SCREEN)
