"""The pages in Markdown: nothing left to fill in, and every relative link leads to a file, and to a heading in it."""

import re
from pathlib import Path

import pytest

from newllm.models import meta_model, preset_names

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = {"NEWLLM_CACHE", "OMP_NUM_THREADS", "SAME_STEP"}  # of the environment, and Gymnasium's autoreset mode
pages = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


def test_the_table_of_models_gives_the_bytes_of_their_caches():
    """Those that one token more adds to the states of the first and the last layer, of all passes together."""
    rows = [line.split("|") for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()]
    figures = {
        name: set(re.findall(r"([\d,]+) B", row[3]))
        for row in rows
        if len(row) == 6
        for name in re.findall(r"`(\w+)`", row[1])
        if name in preset_names()
    }
    assert len(figures) > 30
    for name, given in figures.items():
        model = meta_model(name, vocab_size=64)
        layers, passes = max(1, len(model.layers)), getattr(model, "num_passes", 1)
        before, after = model.state_bytes(50, 2), model.state_bytes(51, 2)  # within every window
        grown = [b - a for a, b in zip(before, after, strict=True)][: passes * layers]
        assert f"{sum(grown[::layers]):,}" in given, name
        if name not in ("infini", "multi_memory", "hierarchical"):  # whose rows tell of their first layer alone
            assert f"{sum(grown[layers - 1 :: layers]):,}" in given, name


@pages
def test_no_placeholder_is_left(page):
    found = set(re.findall(r"\b[A-Z]{3,}_[A-Z_]{3,}\b", page.read_text(encoding="utf-8")))
    assert found <= NAMES


def prose(page):
    """The text of a page without its blocks of code."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page):
    """What the headings of a page are called in links, as GitHub makes it: words in lower case with hyphens between.

    A heading that was there before gets a number.
    """
    found = []
    for heading in re.findall(r"^#+ +(.+?)[ #]*$", prose(page), flags=re.MULTILINE):
        shown = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", heading)
        found.append(re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-"))
    numbered = [f"{name}-{found[:n].count(name)}" if name in found[:n] else name for n, name in enumerate(found)]
    return {*numbered, *re.findall(r"<a (?:id|name)=\"([^\"]+)\"", prose(page))}


def test_anchors_are_those_of_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# `mla`: what it is\n\n## Why, and [how](x.md)?\n\n```\n# no heading\n```\n## A  b_c\n### A  b_c\n"
    )
    assert anchors(page) == {"mla-what-it-is", "why-and-how", "a--b_c", "a--b_c-1"}


@pages
def test_relative_links_lead_somewhere(page):
    links = re.findall(r"\]\(<?([^)\s>]+)", prose(page))
    lost = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            lost.append(link)
    assert not lost
