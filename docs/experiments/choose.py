"""Which memory should I use? Made anew by: python docs/experiments/choose.py

Reads every comparison committed in this folder, and sets those side by side whose text, budget, shape and windows
agree: perplexity, recall and decoding time against bytes of cache. Writes the plot pareto.png (with Chromium), and of
docs/which_memory.md what follows the line `---`; what stands above it is written by hand.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from comparable import CACHE, STATE, Comparison, Group, grouped, read
from pareto_plot import MEASURES, Panel, panels_html

from newllm.experiments.columns import ALL_COLUMNS, LEAD
from newllm.experiments.figures import difference_percent, figure, number
from newllm.experiments.report import markdown_cell
from newllm.experiments.report import recall as across_segments
from newllm.experiments.summary import measured, summarise

HERE = Path(__file__).parent
PAGE, PICTURE = HERE.parent / "which_memory.md", HERE / "pareto.png"
SCREENSHOT = HERE.parent.parent / "tests" / "screenshot.py"
PARAMETERS = ALL_COLUMNS["parameters"]
ABOUT = (
    "Filled points are on the front: no other model has both less cache and a better mean. Bars are 95 % intervals "
    "over seeds, where there are two or more. The front knows means alone and no intervals: see the paired difference "
    "before you believe a small step. Cache: that of one sequence, read from live tensors. Repeated tokens complete a "
    "pair of tokens already seen in the window, so that they can be recalled. Decoding: time for a token after a full "
    "cache, divided by that of the reference measured in the same session; the machine is not quiet, a tenth more or "
    "less is noise. Models with the same bytes are drawn side by side. A triangle at the top: beyond the plot. A "
    "diamond and †: trained on more than the others, and so on no front."
)


def title(group: Group) -> str:
    first = group.comparisons[0]
    shape, windows = (first.terms[key].split(", ") for key in ("shape", "windows"))
    scale = first.results["settings"]["scale"]
    return f"Scale {scale}: {shape[0]}, {shape[1]}, {windows[0]}, {first.tokens:,} tokens of training"


def table(group: Group) -> list[str]:
    """A row for each model, fewest bytes first."""
    context = group.comparisons[0].results["settings"]["decode_context"]
    columns = ["Model", "Seeds", f"Cache at {context:,} tokens, MB", "Bytes a token", "Fixed state, bytes"]
    columns += ["Parameters, million", "Test PPL", f"against `{group.reference}`, paired", "PPL of repeated tokens"]
    columns += ["Decoding, × the time", "On the front"]
    fronts = {measure: group.front(measure) for measure in MEASURES}
    lines = [f"| {' | '.join(columns)} |", "|:--|" + "--:|" * (len(columns) - 2) + ":--|"]
    for choice in group.choices:
        summary = choice.summary
        difference = summary.differences[LEAD.key]
        verdict = f"{difference_percent(difference)}, {difference.verdict}" if difference else "—"
        on = ", ".join(MEASURES[measure].name for measure, models in fronts.items() if summary.model in models)
        cells = [markdown_cell(summary.model) + (" †" if choice.aside else ""), str(len(summary.rows))]
        cells += [number(choice.megabytes, 2), number(summary.mean(CACHE) or 0, 0), number(summary.mean(STATE) or 0, 0)]
        cells += [number(summary.mean(PARAMETERS) or 0, 2), figure(choice.value("ppl"), 2)]
        cells += ["reference" if summary.model == group.reference else verdict, figure(choice.value("recall"), 2)]
        cells += [figure(choice.value("speed"), 2), on]
        lines.append(f"| {' | '.join(cells)} |")
    return lines + [f"\n† {c.summary.model}: {c.aside}." for c in group.choices if c.aside]


def recall_table(comparisons: list[Comparison]) -> list[str]:
    """Facts asked for segments later: bytes of state and answers, of every comparison that measured it."""
    lines = []
    for comparison in comparisons:
        shown = measured(summarise(comparison.results), across_segments.KEY)
        for summary in sorted(shown, key=lambda s: across_segments.state_bytes(s, across_segments.distances(s)[-1])):
            far = across_segments.distances(summary)[-1]
            found, zeroed = (across_segments.accuracy(summary, far, knock_out) for knock_out in ("", "zeroed"))
            cells = [f"[{comparison.name}](experiments/{comparison.name}.md)", markdown_cell(summary.model)]
            cells += [str(len(summary.rows)), number(across_segments.state_bytes(summary, far), 0), str(far)]
            lines.append(f"| {' | '.join([*cells, figure(found, 1), figure(zeroed, 1)])} |")
    head = [
        "Comparison",
        "Model",
        "Seeds",
        "State when asked, bytes",
        "Segments later",
        "Answered, %",
        "memory zeroed, %",
    ]
    return [f"| {' | '.join(head)} |", "|:--|:--|" + "--:|" * (len(head) - 2), *lines] if lines else []


def page(groups: list[Group], comparisons: list[Comparison], missing: list[str]) -> str:
    """The generated part."""
    parts = ["## Measured", "![Perplexity, recall and decoding time against bytes of cache](experiments/pareto.png)"]
    parts.append(ABOUT)
    for group in groups:
        parts.append(f"### {title(group)}")
        made = ", ".join(
            f"[{c.name}](experiments/{c.name}.md) ({c.results['created'][:10]})" for c in group.comparisons
        )
        parts.append(f"From {made}.")
        parts.append("\n".join(f"- {key}: {words}" for key, words in group.comparisons[0].terms.items()))
        parts.append("\n".join(table(group)))
        if group.left_out:
            parts.append("Left out:\n\n" + "\n".join(f"- {reason}" for reason in group.left_out))
    if rows := recall_table(comparisons):
        parts.append("### Facts asked for segments later")
        parts.append(
            "A task of its own, on which the models are trained; their perplexity means nothing here.\n\n"
            + "\n".join(rows)
        )
    if missing:
        parts.append("### On no plot\n\n" + "\n".join(f"- {reason}" for reason in missing))
    return "\n\n".join(parts) + "\n"


def panels(groups: list[Group]) -> list[tuple[str, list[Panel]]]:
    """For each group its title, and a panel for each measure that was taken."""
    rows = []
    for group in groups:
        context = group.comparisons[0].results["settings"]["decode_context"]
        drawn = []
        for measure in MEASURES:
            values = [(c, value) for c in group.choices if (value := c.value(measure)) is not None]
            best = next((value.mean for c, value in values if c.summary.model == group.reference), None)
            points = [(c.summary.model, c.megabytes, value, bool(c.aside)) for c, value in values]
            if best is not None:
                drawn.append(Panel(measure, context, points, group.front(measure), best))
        rows.append((title(group), drawn))
    return rows


def draw(groups: list[Group], picture: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        html = Path(folder) / "pareto.html"
        html.write_text(panels_html(panels(groups)), encoding="utf-8")
        arguments: list[Any] = [html, picture, "--width", "1400", "--height", "0"]
        subprocess.run([sys.executable, SCREENSHOT, *arguments], check=True)


def main() -> None:
    comparisons, refused = read(HERE)
    groups, missing = grouped(comparisons)
    by_hand = PAGE.read_text(encoding="utf-8").split("\n---\n")[0].rstrip()
    PAGE.write_text(f"{by_hand}\n\n---\n\n{page(groups, comparisons, missing + refused)}", encoding="utf-8")
    if shutil.which("chromium"):
        draw(groups, PICTURE)


if __name__ == "__main__":
    main()
