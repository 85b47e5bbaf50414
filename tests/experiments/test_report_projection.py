"""The report's section on diverse projections."""

from results_fixture import make_results

from newllm.experiments.report import write_report
from newllm.experiments.report.projection import projection_plots, projection_section
from newllm.experiments.results import write_results
from newllm.experiments.summary import summarise


def results():
    """gqa and mqa have such a first phase; mqa is invalid with one seed."""
    made = make_results()
    for row in made["rows"]:
        if row["model"] in ("gqa", "mqa"):
            row["projection"] = {
                **{"iterations": 2, "tokens": 1000, "size": 8, "converged": 0.96},
                "curve": [{"iteration": n, "converged": 0.48 * n, "loss": 1 / n} for n in (1, 2)],
                **{when: {"effective_rank": 4.0, "passes": 3} for when in ("before", "after")},
            }
        if (row["model"], row["seed"]) == ("mqa", 1):
            row["valid"] = False
            row["checks"][0]["passed"] = False
    return made


def test_an_invalid_model_is_left_out_as_in_every_comparison(tmp_path):
    summaries = summarise(results())
    assert [row["model"] for row in projection_section(summaries)["rows"]] == ["gqa"]
    (line,) = projection_plots(summaries)["plot-projection"]["data"]
    assert summaries[line["meta"]["model"]].model == "gqa"
    write_results(tmp_path, results())
    section = write_report(tmp_path).with_suffix(".md").read_text().split("## Diverse projection")[1].split("\n## ")[0]
    assert "| gqa | 2.0 |" in section
    assert "mqa" not in section


def test_the_section_stands_where_there_are_such_models():
    summaries = summarise(make_results())
    assert projection_section(summaries) is None
    assert projection_plots(summaries) == {}
