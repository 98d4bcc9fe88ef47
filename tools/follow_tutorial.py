"""Install a wheel into a new environment, and follow the tutorial there.

The files of the page are written, and its commands run in one shell. Each must print what the page shows.
A test follows the whole page. With a wheel the first commands and that of pytest are enough: they use the
package, its command line and its plugin of pytest.
"""

from __future__ import annotations

import glob
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import venv
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "tutorial.rst"
# The marker that ends the output of a command.
END = "-- end of the output --"


def blocks(language: str) -> list[str]:
    """Return the code blocks of the page in one language."""
    pattern = rf"^\.\. code-block:: {language}\n\n((?:    .*\n|\n)+)"
    found = re.findall(pattern, PAGE.read_text(encoding="utf-8"), re.M)
    return [textwrap.dedent(block).strip("\n") for block in found]


def files() -> dict[str, str]:
    """Return the files that a reader writes, by name: the first line of a block names its file."""
    return {block.split("\n", 1)[0].removeprefix("# "): block for block in blocks("python")}


def steps() -> list[tuple[str, str]]:
    """Return each command with the output that the page shows, in order."""
    found = []
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output.strip("\n")))
    return found


def shows(page: str, printed: str) -> bool:
    """Return True if a command printed what the page shows.

    Numbers, ages and spaces may differ. A line of three dots stands for any lines.
    """
    pattern = re.escape(_normal(page)).replace(r"\.\.\.", ".*")
    return re.search(pattern, _normal(printed)) is not None


def _normal(text: str) -> str:
    """Return a text with the same number, unit of time and space everywhere."""
    return re.sub(r"\d[\d.]*(ms|s|m)?", "0", " ".join(text.split()))


def follow(
    programs: Path, folder: Path, steps: list[tuple[str, str]], **environment: str
) -> list[str]:
    """Do in an empty folder what steps of the page say, with the programs of an environment.

    Return the commands that printed something else than the page shows, each with what it printed.
    """
    for name, source in files().items():
        (folder / name).write_text(source + "\n", encoding="utf-8")
    script = "".join(f"{command}\necho '{END}'\n" for command, _ in steps)
    ran = subprocess.run(
        ["bash", "-m"],
        input=f"exec 2>&1\n{script}",
        cwd=folder,
        env={
            "PATH": os.pathsep.join([str(programs), "/usr/bin", "/bin"]),
            "COLUMNS": "200",
            "HOME": str(folder),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    printed = ran.stdout.split(END)[:-1]
    if len(printed) != len(steps):
        return [f"the shell ended early:\n{ran.stdout}"]
    return [
        f"$ {command}\n{really.strip()}"
        for (command, output), really in zip(steps, printed, strict=True)
        if not shows(output, really)
    ]


def main(wheels: str) -> int:
    """Follow the tutorial with the wheel at this path, which may be a pattern. Return the exit code."""
    [wheel] = glob.glob(wheels) or [wheels]
    with tempfile.TemporaryDirectory() as temporary:
        made, folder = Path(temporary, "venv"), Path(temporary, "tutorial")
        folder.mkdir()
        venv.create(made)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--python",
            made / "bin/python",
        ]
        subprocess.run([*pip, "install", "--quiet", f"{wheel}[cli]", "pytest"], check=True)
        subprocess.run([*pip, "check"], check=True)
        some = steps()[:5] + [step for step in steps() if "pytest" in step[0]]
        wrong = follow(made / "bin", folder, some)
    for step in wrong:
        sys.stderr.write(f"not what the tutorial shows:\n{step}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
