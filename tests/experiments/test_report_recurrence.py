"""The report's section on models that feed a state back."""

import pytest
from results_fixture import make_results

from newllm.experiments.report import write_report
from newllm.experiments.report.recurrence import recurrence_plots, recurrence_section
from newllm.experiments.results import summarise, write_results


def results():
    """gqa and mqa feed a state back; one perplexity of mqa came out infinite, which is null."""
    made = make_results()
    for row in made["rows"]:
        factor = {"gqa": 1.0, "mqa": 10.0}.get(row["model"])
        row["recurrence"] = factor and {
            "ppl": None if factor > 1 and row["seed"] == 1 else 80.0 * factor + row["seed"],
            "passes": [{"passes": k, "ppl": 90.0 - k, "residual": 0.5**k} for k in (1, 2, 8)],
        }
        for point in row["curve"]:
            if factor and "train_loss" in point:
                point["residual"] = 1 / (1 + point["tokens"])
    return made


def test_the_section_stands_where_there_are_such_models(tmp_path):
    write_results(tmp_path, make_results())
    without = write_report(tmp_path)
    assert "feed a state back" not in without.read_text() + without.with_suffix(".md").read_text()
    write_results(tmp_path, results())
    html = write_report(tmp_path)
    markdown = html.with_suffix(".md").read_text()
    assert 'id="plot-recurrence"' in html.read_text()
    assert 'id="plot-residual"' in html.read_text()
    lines = markdown.split("## Models that feed a state back")[1].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")][:3]
    assert rows[0] == ["Model", "k = 1", "k = 2", "k = 8", "True", "Residual, k = 1", "Residual, k = 8"]
    gqa = next(row for row in rows if row[0] == "gqa")
    assert gqa[1].startswith("89.00")
    assert gqa[4].startswith("81.00")
    assert gqa[5].startswith("0.500")
    assert "by true recurrence, which is the one that counts: gqa 89.00 and 81.00" in markdown


def test_plots_have_passes_and_the_truth():
    summaries = summarise(results())
    plots = recurrence_plots(summaries)
    traces = {summaries[line["meta"]["model"]].model: line for line in plots["plot-recurrence"]["data"]}
    assert set(traces) == {"gqa", "mqa"}
    assert traces["gqa"]["x"] == ["1", "2", "8", "true"]
    assert traces["gqa"]["y"][-1] == pytest.approx(81)
    assert len(plots["plot-residual"]["data"]) == 2
    assert recurrence_plots(summarise(make_results())) == {}
    assert recurrence_section(summarise(make_results())) is None
