"""The settings of Sphinx, which builds the pages in README.rst, CHANGELOG.rst and docs/ as a site.

The pages are plain reStructuredText, so they can be read in a checkout, too: they link to each other's
files, and tables in ``docs/index.rst`` list them. Here the links are pointed to the built pages, and
the tables become the navigation.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import django
from django.conf import settings
from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.parsers.rst.directives.parts import Contents

import taskx

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "TaskX"
author = "The TaskX authors"
copyright = "The TaskX authors"
version = release = taskx.__version__

# Models need settings before they can be imported, and described.
settings.configure(
    INSTALLED_APPS=["django.contrib.contenttypes", "taskx.contrib.django"],
    TASKS={"default": {"BACKEND": "taskx.contrib.django.TaskxBackend"}},
)
django.setup()

# The source folder is the root of the project.
root_doc = "docs/index"
include_patterns = ["*.rst", "docs/**.rst"]
exclude_patterns = [".*", "build", "dist"]

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # so that an attribute with a comment of its own is not described twice
# In annotations, type is the class and not one of the fields of that name.
suppress_warnings = ["ref.python"]

html_theme = "furo"
html_title = f"TaskX {version}"
html_extra_path = ["site"]  # the start page, at the root of the site
html_copy_source = False
html_theme_options = {"top_of_page_buttons": []}

_ROOT = Path(__file__).parent.parent
# In the index: a title of a section, or a link to a page.
_TITLE_OR_PAGE = re.compile(r"^(?P<title>[^\n]+)\n-{3,}$|`[^`]+ <(?P<page>[^>]+)\.rst>`_", re.M)


def _add_navigation(app: Sphinx, name: str, source: list[str]) -> None:
    """Add a hidden table of contents for each section of the index, with the pages that it links to."""
    if name != root_doc:
        return
    sections: list[tuple[str, list[str]]] = [("", [])]
    for found in _TITLE_OR_PAGE.finditer(source[0]):
        if found["title"]:
            sections.append((found["title"], []))
        else:
            sections[-1][1].append(_resolved(name, found["page"]))
    for title, pages in sections:
        if pages:
            head = [".. toctree::", "   :hidden:", *([f"   :caption: {title}"] if title else [])]
            source[0] += "\n".join(["", *head, "", *(f"   /{page}" for page in pages), ""])


def _link_pages(app: Sphinx, doctree: nodes.document, name: str) -> None:
    """Point the links to files of pages to the built pages."""
    for link in doctree.findall(nodes.reference):
        page, hash_, anchor = link.get("refuri", "").partition("#")
        if page.endswith(".rst") and "://" not in page:
            target = _resolved(name, page.removesuffix(".rst"))
            if target in app.env.found_docs:
                link["refuri"] = app.builder.get_relative_uri(name, target) + hash_ + anchor
                link["internal"] = True


def _resolved(name: str, page: str) -> str:
    """Return the name of a page that a page links to."""
    return (_ROOT / name).parent.joinpath(page).resolve().relative_to(_ROOT).as_posix()


class _NoContents(Directive):
    """A list of sections that is left out: the theme has its own, and draws an error over this one."""

    option_spec = Contents.option_spec

    def run(self) -> list[nodes.Node]:
        return []


# In a signature: a default that is not Python, such as <function f>, and the tilde before a type variable.
_NO_PYTHON = re.compile(r"<[^<>]*(?:<[^<>]*>)?>|\bNOTHING\b")
_VARIABLE = re.compile(r"~(?:typing\.~)?(?=\w+\b(?!\.))")


def _make_parsable(*given: Any) -> tuple[str | None, ...]:
    """Return a signature and what it returns as Python: Sphinx shows other text as it is, with tildes."""
    *_, signature, returns = given
    return tuple(
        text and _VARIABLE.sub("", _NO_PYTHON.sub("...", text)) for text in (signature, returns)
    )


def setup(app: Sphinx) -> None:
    """Connect the functions above."""
    app.add_directive("contents", _NoContents, override=True)
    app.connect("autodoc-process-signature", _make_parsable)
    app.connect("source-read", _add_navigation)
    app.connect("doctree-resolved", _link_pages)
