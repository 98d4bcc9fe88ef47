"""The public names of the dashboard."""

from taskx.programs.dashboard import *  # noqa: F403
from taskx.programs.dashboard import __all__ as __all__
