"""The report's section on selective output: told only where a model has such gates, with all tokens first."""

import pytest
from results_fixture import make_results

from newllm.experiments.report import write_report
from newllm.experiments.results import write_results


def record(must_emit):
    weight = 1.0 if must_emit else 0.131
    passes = [{"ppl": 812.4, "emitted": 0.25, "weight": 0.1}, {"ppl": 644.5, "emitted": 0.75, "weight": weight - 0.1}]
    return {
        "ppl": 655.25, "weighted_ppl": 41.75, "weight": weight, "max_skip": 1, "threshold": 0.5,
        "must_emit": must_emit, "passes": passes,
    }  # fmt: skip


@pytest.mark.parametrize("chosen", [(), ("gqa", "pythia")])
def test_selective_output_is_told_only_where_there_is_any(tmp_path, chosen):
    results = make_results(seeds=1, models=4)
    for row in results["rows"]:
        row["selective"] = record(must_emit=row["model"] == "pythia") if row["model"] in chosen else None
    write_results(tmp_path, results)
    html = write_report(tmp_path).read_text()
    markdown = (tmp_path / "report.md").read_text()
    assert ('id="selective"' in html) == bool(chosen)
    assert ("## Selective output" in markdown) == bool(chosen)
    if chosen:
        assert "| gqa | 655.25 | 41.75 | 0.131 | 25.0; 75.0 | 812.40; 644.50 |" in markdown
        assert "| pythia | 655.25 | 41.75 | 1.000 |" in markdown


def test_perplexities_that_came_out_infinite_are_dashes(tmp_path):
    results = make_results(seeds=2, models=4)
    for row in results["rows"]:
        figures = record(must_emit=False) if row["model"] == "gqa" else None
        if figures:
            figures["ppl"] = figures["passes"][0]["ppl"] = float("inf")
            figures["weighted_ppl"] = float("inf") if row["seed"] else 41.75
        row["selective"] = figures
    write_results(tmp_path, results)
    write_report(tmp_path)
    assert "| gqa | — | 41.75 | 0.131 | 25.0; 75.0 | —; 644.50 |" in (tmp_path / "report.md").read_text()
