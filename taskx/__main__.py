"""``python -m taskx`` is the command ``taskx``."""

from taskx.programs.cli import main

if __name__ == "__main__":
    main()
