"""The style sheet and the scripts: contrast, size, and no help from other sites."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

import taskx.programs.dashboard

STATIC = Path(taskx.programs.dashboard.__file__).parent / "static"
CSS = (STATIC / "taskx.css").read_text()

TEXTS = ("ink", "muted", "link", "ok", "bad", "warn", "run", "wait", "off")


def schemes():
    """Return the colours of the light and of the dark scheme, by name."""
    blocks = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
    found = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", block)) for block in blocks]
    return dict(zip(("light", "dark"), found, strict=True))


def luminance(colour):
    """Return the relative luminance of a colour, as WCAG 2 defines it."""
    channels = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_computed_as_defined():
    assert contrast("#000000", "#ffffff") == 21
    assert round(contrast("#777777", "#ffffff"), 2) == 4.48


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_are_readable_on_every_background(scheme):
    colours = schemes()[scheme]
    for text in TEXTS:
        for ground in ("paper", "card"):
            ratio = contrast(colours[text], colours[ground])
            assert ratio >= 4.5, f"{text} on {ground}: {ratio:.2f}"
    assert contrast(colours["paper"], colours["link"]) >= 4.5  # a chosen link, a main button


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_borders_of_fields_and_lines_of_charts_are_visible(scheme):
    colours = schemes()[scheme]
    for edge in ("edge", "link", "ok", "bad"):
        for ground in ("paper", "card"):
            assert contrast(colours[edge], colours[ground]) >= 3, f"{edge} on {ground}"


def test_each_colour_has_both_schemes_and_is_used():
    found = schemes()
    assert found["light"].keys() == found["dark"].keys()
    assert found["light"].keys() == set(re.findall(r"var\(--(\w+)\)", CSS))


def test_focus_is_visible_and_motion_can_be_reduced():
    assert ":focus-visible { outline: 3px solid" in CSS
    assert "prefers-reduced-motion: reduce" in CSS


def test_nothing_is_loaded_from_elsewhere():
    assert not re.search(r"url\(|@import|https?:", CSS)
    for name in ("refresh.js", "taskx.js"):
        assert not re.search(r"https?:|eval\(|innerHTML", (STATIC / name).read_text())


def test_all_files_together_are_small():
    size = sum(
        len(gzip.compress(path.read_bytes())) for path in STATIC.glob("*") if path.suffix != ".txt"
    )
    assert size <= 20 * 1024
