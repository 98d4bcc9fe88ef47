"""Make the virtual environment named on the command line, or print in one sentence why it is impossible.

The Makefile runs this file with any Python, so its syntax must be valid in Python 2.7.
"""

import os
import subprocess
import sys

OLDEST = (3, 10)
ANOTHER = "name another one, as in: PYTHON=python3.12 make test"


def why_not(folder):
    """Return the reason why this Python cannot make the environment; None if it can."""
    if os.path.isdir(folder) and os.listdir(folder) and "pyvenv.cfg" not in os.listdir(folder):
        return (
            "%s is not a virtual environment, and making one would empty it: choose another VENV"
            % folder
        )
    this = "%s is Python %s" % (sys.executable, ".".join(map(str, sys.version_info[:3])))
    if tuple(sys.version_info[:2]) < OLDEST:
        return "TaskX needs Python 3.10 or newer, and %s: %s" % (this, ANOTHER)
    try:
        import ensurepip  # noqa: F401  Debian has it, and thus a working venv, in a separate package
        import venv  # noqa: F401
    except ImportError as error:
        return (
            "TaskX's Makefile needs Python's venv module; %s, but without that module (%s): "
            "install it (on Debian and Ubuntu: apt install python3-venv), or %s"
            % (this, error, ANOTHER)
        )
    return None


if __name__ == "__main__":
    folder = sys.argv[1]
    sys.exit(why_not(folder) or subprocess.call([sys.executable, "-m", "venv", "--clear", folder]))
