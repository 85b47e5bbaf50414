"""The report's section on models that feed a state back."""

import sys
from pathlib import Path

import pytest
from results_fixture import make_results

from newllm.experiments.report import write_report
from newllm.experiments.report.recurrence import recurrence_plots, recurrence_section
from newllm.experiments.results import read_results, write_results
from newllm.experiments.summary import summarise

sys.path.insert(0, str(Path(__file__).parents[1]))
from chromium import needs_chromium
from screenshot import browser, open_report


def section(folder, made):
    """The report's section as text: its paragraph in HTML, its paragraph in Markdown, and the rows of the latter."""
    write_results(folder, made)
    html = write_report(folder)
    markdown = html.with_suffix(".md").read_text().split("## Models that feed a state back")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if line.startswith("| ")]
    return html.read_text().split('id="recurrence"')[1].split("</p>")[0], markdown, rows


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


@needs_chromium
def test_each_legend_has_the_models_of_its_curves_and_one_switches_them_off_in_all(tmp_path):
    write_results(tmp_path, results())
    with browser(1280, 900) as driver:
        open_report(driver, write_report(tmp_path))
        curves, passes = driver.find_elements("css selector", ".legend")
        all_models, of_passes = (
            [button.text for button in legend.find_elements("css selector", "button")] for legend in (curves, passes)
        )
        assert all_models == list(dict.fromkeys(row["model"] for row in results()["rows"]))
        assert of_passes == ["gqa", "mqa"]
        driver.execute_script("arguments[0].children[1].click()", passes)
        off = "return [...document.querySelectorAll('.legend [aria-pressed=false]')].map(each => each.textContent)"
        assert driver.execute_script(off) == ["mqa", "mqa"]
        drawn = "return document.querySelectorAll('#plot-recurrence .scatterlayer .trace').length"
        assert driver.execute_script(drawn) == 1


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


def test_figures_that_are_all_infinite_are_dashes(tmp_path):
    made = results()
    for row in made["rows"]:
        for record in (row["recurrence"] or {}).get("passes", []):
            record["ppl"] = float("inf")
    _, _, rows = section(tmp_path, made)
    assert rows[0] == ["Model", "k = 1", "k = 2", "k = 8", "True", "Residual, k = 1", "Residual, k = 8"]
    gqa = next(row for row in rows if row[0] == "gqa")
    assert gqa[1:4] == ["—"] * 3
    assert gqa[4].startswith("81.00")
    assert gqa[5:] == ["0.500", "0.004"]
    plots = recurrence_plots(summarise(read_results(tmp_path)))
    assert [line["x"] for line in plots["plot-recurrence"]["data"]] == [["true"]] * 2
    for row in made["rows"]:
        if row["recurrence"]:
            row["recurrence"]["ppl"] = float("nan")
    _, _, rows = section(tmp_path, made)
    assert [row[1:5] for row in rows[1:]] == [["—"] * 4] * 2
    assert "plot-recurrence" not in recurrence_plots(summarise(read_results(tmp_path)))


def test_what_is_said_of_a_discrete_pass_is_said_of_the_first(tmp_path):
    made = results()
    for row in made["rows"]:
        if row["recurrence"]:
            row["recurrence"]["passes"][0]["ppl"] = None
    write_results(tmp_path, made)
    assert "Perplexity with states of a discrete pass" not in write_report(tmp_path).with_suffix(".md").read_text()


@pytest.mark.parametrize("step_by_step", [None, False, True])
def test_it_is_said_how_the_models_were_trained(tmp_path, step_by_step):
    made = results()
    if step_by_step is not None:
        made["settings"]["step_by_step"] = step_by_step
    html, markdown, _ = section(tmp_path, made)
    for text in (html, markdown):
        assert ("trained in parallel" in text) == (not step_by_step)
        assert ("trained by it too, one token after the other" in text) == bool(step_by_step)
