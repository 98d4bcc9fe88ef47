"""The public names of the dashboard."""

from taskx.programs.dashboard import *  # noqa: F403
from taskx.programs.dashboard import __all__ as __all__

# Its modules can be imported from here, too.
from taskx.programs.dashboard import __path__ as __path__
