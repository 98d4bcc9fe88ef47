"""The public names of the command line: ``main``, and ``make_group`` in ``app``.

The command line itself is in ``taskx.programs.cli``.
"""

from taskx.programs.cli import main as main
