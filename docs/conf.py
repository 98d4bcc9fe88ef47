"""The settings of Sphinx, which builds the pages in README.rst, CHANGELOG.rst and docs/ as a site.

The pages are plain reStructuredText, so they can be read in a checkout, too: they link to each other's
files. ``docs/index.rst`` lists the groups of pages, and the page of a group lists its pages. Here the links
are pointed to the built pages, and the two kinds of lists become the two levels of the navigation.
"""

from __future__ import annotations

import html
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

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
copybutton_prompt_text = "$ "  # of consoles, only the commands are copied
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # so that an attribute with a comment of its own is not described twice
# In annotations, type is the class and not one of the fields of that name.
# The index links to the READMEs above its lists: it says the same, so they are not in the navigation.
suppress_warnings = ["ref.python", "toc.not_included"]

html_theme = "furo"
html_title = f"TaskX {version}"
html_extra_path = ["site"]  # the start page, at the root of the site
html_static_path = ["static"]
html_css_files = ["site.css"]
html_logo = html_favicon = "static/logo.svg"
html_copy_source = False
html_theme_options = {
    "top_of_page_buttons": [],
    "light_css_variables": {"color-brand-primary": "#0f766e", "color-brand-content": "#0f766e"},
    "dark_css_variables": {"color-brand-primary": "#2dd4bf", "color-brand-content": "#5eead4"},
}

_ROOT = Path(__file__).parent.parent
# In a list of pages: a link to a page at the beginning of an item.
_LISTED = re.compile(r"^- `([^`]+?)\s+<([^>]+)\.rst>`_", re.M)
# The heading of the list of groups in the index. What stands above it is no navigation.
_GROUPS = "All pages\n---------\n"


def _listed(text: str, name: str) -> dict[str, str]:
    """Return the pages that a list has, by the names that it gives them."""
    return {title: _resolved(name, page) for title, page in _LISTED.findall(text)}


def _add_navigation(app: Sphinx, name: str, source: list[str]) -> None:
    """Add a hidden table of contents to the index, and to the page of each group."""
    index = (_ROOT / root_doc).with_suffix(".rst").read_text(encoding="utf-8")
    groups = _listed(index.partition(_GROUPS)[2], root_doc)
    if name == root_doc:
        pages = groups
    elif name in groups.values():
        pages = _listed(source[0], name)
    else:
        return
    lines = [f"   {title} </{page}>" for title, page in pages.items()]
    source[0] += "\n".join(["", ".. toctree::", "   :hidden:", "", *lines, ""])


# The words of a page for which people search, in its ``meta``.
_KEYWORDS = re.compile(r"^   :keywords: (.+)$", re.M)


def _add_search_words(app: Sphinx, name: str, source: list[str]) -> None:
    """Let the search find a page first by its keywords."""
    words = [word for line in _KEYWORDS.findall(source[0]) for word in line.split(", ")]
    source[0] = "".join(f".. index:: ! {word}\n" for word in words) + "\n" + source[0]


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


# The first heading of a table whose rows are options.
_OPTIONS = re.compile(r"(?:\w+ )?[Oo]ption|Argument|Config")


def _anchor_options(app: Sphinx, doctree: nodes.document, name: str) -> None:
    """Give each option of a table an anchor, such as ``option-delay``, and link the option to it."""
    for table in doctree.findall(nodes.table):
        head, *rows = table.findall(nodes.row)
        if not _OPTIONS.fullmatch(head[0].astext()):
            continue
        for literal in [found for row in rows for found in row[0].findall(nodes.literal)]:
            anchor = f"option-{re.sub(r'[^a-z]+', '-', literal.astext().lower()).strip('-')}"
            if anchor not in doctree.ids:
                doctree.ids[anchor] = literal
                literal["ids"].append(anchor)
                link = nodes.reference(
                    "", "", refuri=f"#{anchor}", internal=True, classes=["option"]
                )
                literal.replace_self(link)
                link += literal


def _describe(app: Sphinx, name: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Let search engines show the first paragraph of a page, as its description."""
    first = next(iter(doctree.findall(nodes.paragraph)), None) if doctree else None
    if first is not None:
        text = html.escape(" ".join(first.astext().split())[:300])
        context["metatags"] = context.get("metatags", "") + (
            f'<meta name="description" content="{text}">'
        )


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
    app.connect("source-read", _add_search_words)
    app.connect("doctree-resolved", _link_pages)
    app.connect("doctree-resolved", _anchor_options)
    app.connect("html-page-context", _describe)
