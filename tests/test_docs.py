"""The pages in Markdown: nothing left to fill in, and every relative link leads to a file."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = {"NEWLLM_CACHE", "OMP_NUM_THREADS", "SAME_STEP"}  # of the environment, and Gymnasium's autoreset mode
pages = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


@pages
def test_no_placeholder_is_left(page):
    found = set(re.findall(r"\b[A-Z]{3,}_[A-Z_]{3,}\b", page.read_text(encoding="utf-8")))
    assert found <= NAMES


@pages
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(<?([^)\s>]+)", text)
    relative = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    assert not [target for target in relative if not (page.parent / target).exists()]
