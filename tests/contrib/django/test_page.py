"""The pages about Django are projects: their blocks are the files that their first lines name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from helpers import PATIENCE, ROOT
from test_docs import RUNNER, blocks

pytestmark = pytest.mark.process

BEFORE = {
    "settings.py": """
        from pathlib import Path
        BASE_DIR = Path(__file__).parent
        SECRET_KEY, USE_TZ, ROOT_URLCONF = "tests", True, "urls"
        INSTALLED_APPS = ["shop"]
        DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": BASE_DIR / "site.db"}}
        DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
    """,
    "shop/__init__.py": "",
    "urls.py": "urlpatterns = []",
}
# The pages of each project, in the order in which a reader would follow them.
MOVED = ["django-moving.rst"]
SITE = ["django.rst", "django-tasks.rst", "django-transactions.rst", "django-admin.rst"]


@pytest.mark.parametrize("pages", [SITE, MOVED], ids=["site", "moved"])
def test_the_project_of_the_pages_passes_its_checks_and_tests_and_its_snippets_run(tmp_path, pages):
    for name, text in BEFORE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    snippets = []
    for page in pages:
        for line, source in blocks(ROOT / "docs" / page, "python"):
            first, _, rest = source.partition("\n")
            if first.startswith("# ") and first.endswith(".py"):
                with (tmp_path / first[2:]).open("a") as file:
                    file.write(f"\n{rest}\n\n")
            else:
                snippets.append((line, source))
    assert snippets
    run(tmp_path, "-m", "django", "migrate", "--verbosity", "0")
    assert "no issues" in run(tmp_path, "-m", "django", "check")
    if (tmp_path / "shop" / "tests.py").exists():
        assert "Ran 3 tests" in run(tmp_path, "-W", "error", "-m", "django", "test")
    program = f"import django\ndjango.setup()\n{RUNNER}"
    run(tmp_path, "-c", program, pages[-1], given=json.dumps(snippets))
    assert not [*tmp_path.glob("*.sqlite3")]  # all is in the database of the site


def test_every_page_about_django_with_code_is_in_a_project():
    pages = {page.name for page in (ROOT / "docs").glob("django*.rst") if blocks(page, "python")}
    assert pages == {*SITE, *MOVED}


def run(folder: Path, *arguments: str, given: str = "") -> str:
    """Run Python in the project; return what it printed."""
    ran = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
            "DJANGO_SETTINGS_MODULE": "settings",
        },
        input=given,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr
