"""The build script. All metadata but the description are in setup.cfg."""

import re
from pathlib import Path

from setuptools import setup

# A link to a file of the project: its text, and the name of the file.
_LINK = re.compile(r"`([^`<]+?)\s+<(?!https?://)[^>]+>`__?")


def long_description():
    """Return the README for a package index, which has no other files: their links become plain text."""
    return _LINK.sub(r"\1", Path("README.rst").read_text(encoding="utf-8"))


setup(long_description=long_description(), long_description_content_type="text/x-rst")
