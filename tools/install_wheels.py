"""Install this project for a Python without the interpreter's lock, as far as that has wheels.

A package that has none is left out, and so are the tests that need it.
"""

import configparser
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
#: It needs greenlet, which switches the lock on.
LOCKS = "playwright"


def wanted() -> list[str]:
    """Return the requirements of the extra ``test``, and those of the extras that it names."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    found, todo = [], ["test"]
    while todo:
        for line in extras[todo.pop()].split("\n"):
            if line.startswith("taskx-queue["):
                todo += line.partition("[")[2].rstrip("]").split(",")
            elif line and not line.startswith(LOCKS):
                found.append(line)
    return [*dict.fromkeys(found)]


def install(requirements: list[str]) -> list[str]:
    """Install requirements from wheels, in as few calls of pip as possible; return those without one."""
    command = [*PIP, "--only-binary", ":all:", *requirements]
    if not subprocess.run(command, check=False, capture_output=True).returncode:
        return []
    if len(requirements) == 1:
        return requirements
    half = len(requirements) // 2
    return install(requirements[:half]) + install(requirements[half:])


if __name__ == "__main__":
    subprocess.run([*PIP, "--no-compile", "--use-pep517", "--editable", str(ROOT)], check=True)
    sys.stdout.write(f"Left out: {', '.join([*install(wanted()), LOCKS])}\n")
