"""Puts a finished comparison on its page: python docs/experiments/publish.py runs/positions2 positions [SECTION]

The page NAME.md is written by hand down to its line `---`; what follows is the report of the comparison, and is
replaced. NAME.json is its results.json; with Chromium installed, NAME.png is the head of its HTML report,
or with SECTION what stands from the heading of this id on (recall, reversal).
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SCREENSHOT = HERE.parent.parent / "tests" / "screenshot.py"


def publish(results: Path, name: str, section: str | None = None) -> None:
    page = HERE / f"{name}.md"
    by_hand = page.read_text().split("\n---\n")[0].rstrip() if page.is_file() else f"# {name}"
    report = re.sub(r"^# .*", "## The report", (results / "report.md").read_text(), count=1)
    report = re.sub(r"^## (?!The report$)", "### ", report, flags=re.M)
    page.write_text(f"{by_hand}\n\n---\n\n{report}")
    shutil.copyfile(results / "results.json", HERE / f"{name}.json")
    if shutil.which("chromium"):
        arguments = [results / "report.html", HERE / f"{name}.png", "--width", "1200", "--height", "860"]
        subprocess.run([sys.executable, SCREENSHOT, *arguments, *(["--at", section] if section else [])], check=True)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or not (Path(sys.argv[1]) / "report.md").is_file():
        sys.exit("usage: publish.py FOLDER_OF_A_COMPARISON NAME_OF_THE_PAGE [SECTION]")
    publish(Path(sys.argv[1]), *sys.argv[2:])
