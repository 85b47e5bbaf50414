"""The report's section on the reversal curse: what it says follows from the intervals, and it is there to be seen."""

import random
import re
import sys
from pathlib import Path

import pytest
from results_fixture import make_results

from newllm.experiments.report import findings, write_report
from newllm.experiments.report.reversal import auc, reversal_plots, verdict
from newllm.experiments.results import write_results
from newllm.experiments.summary import summarise

sys.path.insert(0, str(Path(__file__).parents[1]))
from chromium import needs_chromium
from screenshot import browser, open_report

# Forward recall, backward AUC of what was told forward, backward recall of what was told both ways.
KNOWS = {
    "pythia": (0.99, 0.5, 0.98),
    "pythia_alibi": (0.98, 0.71, 0.98),
    "gqa": (0.40, 0.5, 0.98),
    "mqa": (0.99, 0.5, 0.60),
}
VERDICTS = {
    "pythia": "no backward recall shown",
    "pythia_alibi": "backward recall",
    "gqa": "cannot tell: the facts are not learnt",
    "mqa": "cannot tell: the backward questions are not learnt",
}


def make_reversal(model, seed):
    """As evaluate_reversal gives it."""
    rng = random.Random(f"reversal-{model}-{seed}")
    told, backward, ceiling = KNOWS[model]

    def share(value):
        value = min(1.0, max(0.0, value + rng.gauss(0, 0.004)))
        return {"value": value, "low": max(0.0, value - 0.05), "high": min(1.0, value + 0.05)}

    def figures(exact, auc, first):
        return {
            **{"auc": share(auc), "p": 0.31 if auc < 0.6 else 0.0001, "first": share(first), "chance": 0.05},
            **{"exact": share(exact), "auc_kind": 0.4, "auc_pool": 0.7, "first_pool": share(first)},
            **{"mean_rank_pool": 240 * (1 - auc) + 1, "answer_ppl": 3.0},
        }

    return {
        "pairs": 240,
        "kinds": ["capital", "mother"],
        "left_out": ["Rome – Caesar"],
        "groups": {
            "forward": {"pairs": 120, "forward": figures(told, 0.99, told), "backward": figures(0, backward, 0.05)},
            "both": {"pairs": 60, "forward": figures(told, 0.99, told), "backward": figures(ceiling, 0.99, ceiling)},
            "never": {"pairs": 60, "forward": figures(0, 0.5, 0.1), "backward": figures(0, 0.5, 0.1)},
        },
        "told": told > 0.95,
        "needed": 0.95,
        "forward_ppl": 1.6,
        "backward_ppl": 6.8,
        "ratio": 0.235,
        "gap": 5.2,
        "readings": 105.4 + 10 * seed,
        "by_kind": [],
        "example": {"told": "The mother of <A> is B.", "asked": "The child of B is", "answer": "<A>"},
    }


def results_of(seeds=3):
    results = make_results(seeds)
    for row in results["rows"]:
        if row["model"] in KNOWS:
            row["reversal"] = make_reversal(row["model"], row["seed"])
    return results


def report(folder, results):
    write_results(folder, results)
    return write_report(folder)


def test_a_verdict_needs_facts_learnt_and_questions_learnt():
    summaries = {s.model: s for s in summarise(results_of())}
    assert {model: verdict(summaries[model]) for model in KNOWS} == VERDICTS


def test_the_interval_of_one_seed_is_that_of_its_pairs():
    (summary,) = [s for s in summarise(results_of(1)) if s.model == "pythia"]
    assert auc(summary).half_width == pytest.approx(0.05)
    assert verdict(summary) == "no backward recall shown"


def test_bars_stay_within_what_is_possible():
    plots = reversal_plots(summarise(results_of()))
    for name, most in (("plot-reversal", 1), ("plot-reversal-exact", 100)):
        assert len(plots[name]["data"]) == len(KNOWS)
        for line in plots[name]["data"]:
            for y, up, down in zip(line["y"], line["error_y"]["array"], line["error_y"]["arrayminus"], strict=True):
                assert -1e-9 <= y - down <= y + up <= most + 1e-9
    assert reversal_plots(summarise(make_results())) == {}


def test_the_section_stands_only_where_it_was_measured(tmp_path):
    without = report(tmp_path / "without", make_results())
    assert "reversal curse" not in without.read_text() + without.with_suffix(".md").read_text()
    html = report(tmp_path / "with", results_of())
    assert "<A>" not in html.read_text().split("<script")[0]
    markdown = html.with_suffix(".md").read_text()
    section = markdown.split("## The reversal curse")[1].split("\n## ")[0]
    assert "Left out, since the text tells of them: Rome – Caesar." in section
    assert "Each sentence had been read 105–125 times when the weights were kept." in section
    for table in re.findall(r"(?:^\|.*\n)+", section, flags=re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1
        assert len(table.splitlines()) == 2 + len(KNOWS)
    row = next(line for line in section.splitlines() if line.startswith("| pythia\\_alibi "))
    assert row.split("|")[-2].strip() == VERDICTS["pythia_alibi"]
    assert row.split("|")[5].strip() == "0.0001"


def test_the_summary_says_what_may_be_said():
    results = results_of()
    said = dict(findings.findings(results, summarise(results)))["Reversal"]
    assert re.search(r"Backward recall: pythia_alibi \(forward 9\d %, AUC 0\.7\d", said)
    assert "Cannot tell: the facts are not learnt: gqa (forward 4" in said or "gqa (forward 3" in said
    assert "Reversal" not in dict(findings.findings(make_results(), summarise(make_results())))


@needs_chromium
def test_the_section_is_drawn(tmp_path):
    html = report(tmp_path, results_of())
    with browser(1280, 900) as driver:
        open_report(driver, html)
        assert not driver.get_log("browser")
        assert driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth") <= 0
        lines = "return document.querySelectorAll('#plot-reversal .scatterlayer .trace').length"
        assert driver.execute_script(lines) == len(KNOWS)
