"""Check the HTML pages in the folder of a built site.

- Each link leads to a file in the folder, and to an anchor of that page. Links to other sites are not
  followed.
- No page has a list of its sections: the theme draws one beside the page, and an error over another one.
- The signatures of the reference are Python, and name what a user can import.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# In a signature: the tilde before a name that was not resolved, the text of an object that is not Python,
# and the module of a name.
_UNFIT = re.compile(r"~[\w.]*|<[^>]*>|\btaskx\.[\w.]+")


class _Page(HTMLParser):
    """The links, the anchors and the signatures of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.signatures: list[str] = []
        self.lists_sections = False
        self._inside: list[str] = []  # the classes of the elements of the signature that is read
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = dict(attrs).get("class") or ""
        self.lists_sections |= "contents" in classes.split()
        if self._inside or (tag == "dt" and "sig" in classes.split()):
            if not self._inside:
                self.signatures.append("")
            self._inside.append(classes)
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)

    def handle_endtag(self, tag: str) -> None:
        del self._inside[-1:]

    def handle_data(self, data: str) -> None:
        if self._inside and not any("descclassname" in classes for classes in self._inside):
            self.signatures[-1] += data


def problems(folder: Path) -> Iterator[str]:
    """Yield what is wrong with the pages, each with the page that has it."""
    pages = {path.resolve(): _Page(path) for path in folder.rglob("*.html")}
    for path, page in sorted(pages.items()):
        name = path.relative_to(folder.resolve())
        for link in page.links:
            if not _leads_somewhere(path, link, pages):
                yield f"broken link: {name}: {link}"
        if page.lists_sections:
            yield f"list of sections, over which the theme draws an error: {name}"
        for signature in page.signatures:
            if found := _UNFIT.search(signature):
                yield f"{found[0]!r} in a signature: {name}: {' '.join(signature.split())}"


def _leads_somewhere(path: Path, link: str, pages: dict[Path, _Page]) -> bool:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return True
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if target not in pages:
        return target.exists()
    return not parts.fragment or unquote(parts.fragment) in pages[target].anchors


def main(folder: str) -> int:
    """Print what is wrong with the pages in a folder. Return the exit code: 1 if there is anything."""
    if not Path(folder).is_dir():
        sys.stderr.write(f"{folder} is not a folder\n")
        return 2
    found = [*problems(Path(folder))]
    sys.stderr.writelines(f"{problem}\n" for problem in found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
