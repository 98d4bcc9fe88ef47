"""The public names of the engines of a queue."""

from taskx.node.broker import *  # noqa: F403
from taskx.node.broker import __all__ as __all__
from taskx.node.broker import __path__ as __path__  # its modules can be imported from here, too
