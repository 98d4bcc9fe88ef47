"""``python -m taskx`` is the command ``taskx``."""

from taskx.cli import main

if __name__ == "__main__":
    main()
