"""The report, opened in headless Chromium as a reader would."""

import errno
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from results_fixture import make_results

from newllm.errors import UserError
from newllm.experiments.figures import difference_percent
from newllm.experiments.report import facts, findings, plots, write_report
from newllm.experiments.report.recall import accuracy, recall_plots
from newllm.experiments.results import write_results
from newllm.experiments.rows import describe_layer
from newllm.experiments.summary import summarise
from newllm.experiments.terminal import print_table, table_console
from newllm.models.layers import create_layer

sys.path.insert(0, str(Path(__file__).parents[1]))
from chromium import needs_chromium, overflow
from screenshot import browser, open_report, set_viewport


def report(folder, results):
    write_results(folder, results)
    return write_report(folder)


def invalidate(results, model="pythia_alibi"):
    for row in results["rows"]:
        if row["model"] == model:
            row |= {"valid": False, "test_ppl": 1.5}
            row["checks"][0] |= {"passed": False, "detail": "changing token 17 changes logit 16"}
            row["checks"][2] |= {"passed": None, "detail": "not judged: 'future' fails"}
    return results


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A driver with the report of six models open, at desktop width."""
    html = report(tmp_path_factory.mktemp("report"), make_results())
    with browser(1280, 900) as driver:
        open_report(driver, html)
        yield driver


def column(driver, index):
    script = (
        "return [...document.querySelectorAll('#main-table tbody tr')].map(r => r.cells[arguments[0]].dataset.value)"
    )
    return driver.execute_script(script, index)


def sort_state(driver, index):
    return driver.execute_script(
        "return document.querySelector('#main-table thead tr').cells[arguments[0]].getAttribute('aria-sort')", index
    )


@needs_chromium
def test_table_is_sorted_by_clicks_and_by_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    buttons = page.find_elements("css selector", "#main-table thead button")
    assert sort_state(page, 1) == "ascending"
    assert column(page, 1) == sorted(column(page, 1), key=float)
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", buttons[1])
    buttons[1].click()
    assert sort_state(page, 1) == "descending"
    assert column(page, 1) == sorted(column(page, 1), key=float, reverse=True)
    buttons[5].click()  # tokens/s: the best, which is the highest, comes first
    assert (sort_state(page, 1), sort_state(page, 5)) == ("none", "descending")
    assert column(page, 5) == sorted(column(page, 5), key=float, reverse=True)
    buttons[5].send_keys(Keys.ENTER)
    assert sort_state(page, 5) == "ascending"
    assert column(page, 5) == sorted(column(page, 5), key=float)
    buttons[0].send_keys(Keys.SPACE)
    assert column(page, 0) == sorted(column(page, 0))


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_page_never_scrolls_sideways(page, width):
    set_viewport(page, width, 900)
    page.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert page.execute_script("return window.innerWidth") == width
    page.execute_async_script("setTimeout(arguments[0], 600)")  # plots are drawn again after a resize
    assert overflow(page) == 0
    set_viewport(page, 1280, 900)


@needs_chromium
def test_plots_are_drawn_and_the_legend_switches_models_off(page):
    plots = page.find_elements("css selector", ".plot")
    assert len(plots) == 5
    for plot in plots:
        assert plot.find_elements("css selector", ".scatterlayer .trace"), plot.get_attribute("id")
    names = page.execute_script(
        "return [...document.querySelectorAll('#plot-cache .annotation-text')].map(e => e.textContent)"
    )
    assert {"pythia", "gqa", "mqa"} <= set(names)
    count = "return document.querySelectorAll('#plot-position .scatterlayer .trace').length"
    before = page.execute_script(count)
    button = page.find_elements("css selector", "#legend button")[1]
    page.execute_script("arguments[0].click()", button)
    assert button.get_attribute("aria-pressed") == "false"
    assert page.execute_script(count) == before - 1
    page.execute_script("arguments[0].click()", button)


@needs_chromium
def test_header_explains_itself_on_hover_and_the_command_is_copied(page):
    from selenium.webdriver import ActionChains

    button = page.find_elements("css selector", "#main-table thead button")[1]
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    ActionChains(page).move_to_element(button).perform()
    assert "equally likely" in page.find_element("id", "tip").text
    copy = page.find_element("id", "copy")
    page.execute_script("arguments[0].click()", copy)
    page.execute_async_script("setTimeout(arguments[0], 200)")
    assert copy.text in ("Copied", "Selected")


@needs_chromium
def test_no_error_in_the_console_and_nothing_is_loaded_from_elsewhere(page):
    assert page.get_log("browser") == []
    assert page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []


@needs_chromium
@pytest.mark.parametrize(("seeds", "models"), [(1, 1), (5, 15)])
def test_one_model_and_fifteen_in_the_dark_on_a_phone(tmp_path, seeds, models):
    html = report(tmp_path, make_results(seeds, models))
    with browser(390, 800, dark=True) as driver:
        open_report(driver, html)
        assert overflow(driver) == 0
        assert driver.get_log("browser") == []
        background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert max(map(int, re.findall(r"\d+", background)[:3])) < 40


class Elements(HTMLParser):
    """Names of all elements, and every address an element would load."""

    def __init__(self):
        super().__init__()
        self.tags, self.addresses = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for key, value in attributes if key in ("src", "href", "srcset", "data")]


def test_names_samples_and_errors_cannot_become_html(tmp_path):
    attack = "</script><img src=x onerror=alert(1)>"
    results = make_results(1, 2)
    results["rows"][1] |= {"model": attack, "sample": attack, "layers": attack}
    results["rows"][1]["checks"][0] |= {"name": attack, "detail": attack, "passed": False}
    results["failed"] = [{"model": attack, "seed": 0, "error": attack}]
    results |= {"name": attack, "command": attack, "data": {"corpus": attack}}
    html = report(tmp_path, results)
    parser = Elements()
    parser.feed(html.read_text())
    assert "img" not in parser.tags
    assert parser.addresses == []
    assert parser.tags.count("script") == 3
    outside_code = re.sub(r"```.*?```", "", (tmp_path / "report.md").read_text(), flags=re.S)
    assert "<img" not in outside_code


def test_markdown_has_the_figures_the_command_and_whole_tables(tmp_path):
    results = make_results()
    report(tmp_path, results)
    text = (tmp_path / "report.md").read_text()
    assert results["command"] in text
    assert "Intel Xeon" in text
    assert "three seeds: 0, 1, 2" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        lines = table.splitlines()
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, table
        assert len(lines) > 2


def test_an_invalid_model_is_unmistakable_and_wins_nothing(tmp_path):
    results = invalidate(make_results())
    html = report(tmp_path, results).read_text()
    assert "INVALID: pythia_alibi.</strong> It fails: future. It sees the tokens it should predict. Its perp" in html
    assert "changing token 17 changes logit 16" in html
    assert '<td class="not-judged">not judged</td>' in html
    assert "pythia\\_alibi **INVALID**" in (tmp_path / "report.md").read_text()
    said = findings.headline(results, summarise(results))
    assert said.startswith("None of the other models has a lower test perplexity than the baseline pythia")


def test_an_invalid_model_that_mixes_rows_is_not_said_to_see_the_future():
    results = make_results()
    for row in results["rows"]:
        if row["model"] == "gqa":
            row["valid"] = False
            row["checks"][1]["passed"] = row["checks"][2]["passed"] = False
    said = dict(findings.findings(results, summarise(results)))["Checks"]
    assert said.startswith("gqa: INVALID. It fails: rows, chunks. Its perplexity means nothing")


def test_a_leak_that_shows_only_as_trained_is_called_one():
    results = make_results()
    for row in results["rows"]:
        if row["model"] == "gqa":
            row["valid"] = False
            row["checks"].append({"name": "future, as trained", "passed": False, "detail": "leaks the future"})
    said = dict(findings.findings(results, summarise(results)))["Checks"]
    assert said.startswith("gqa: INVALID. It fails: future, as trained. It sees the tokens it should predict. Its perp")


def test_a_model_that_has_failed_stands_at_the_edge_of_the_plots():
    results = make_results()
    summaries = summarise(results)
    assert not plots.far_off(summaries)
    usual = plots.perplexity_plot(summaries), plots.cache_plot(summaries)
    for row in results["rows"]:
        if row["model"] == "gqa":
            row["test_ppl"] = 2252.0 + row["seed"]
    perplexity, cache = (plot(summarise(results)) for plot in (plots.perplexity_plot, plots.cache_plot))
    assert [note["text"] for note in perplexity["layout"]["annotations"]] == ["2,253, beyond the plot →"]
    assert "beyond the plot: gqa 2,253" in cache["layout"]["xaxis"]["title"]["text"]
    for before, after in zip(usual, (perplexity, cache), strict=True):
        assert {trace["meta"]["model"] for trace in before["data"]} - {
            trace["meta"]["model"] for trace in after["data"]
        } == {next(i for i, summary in enumerate(summaries) if summary.model == "gqa")}


def test_no_line_leads_to_a_baseline_that_is_beyond_the_plot():
    results = make_results()
    assert plots.perplexity_plot(summarise(results))["layout"]["shapes"]
    for row in results["rows"]:
        if row["model"] == "pythia":
            row["test_ppl"] = 2252.0
    assert not plots.perplexity_plot(summarise(results))["layout"]["shapes"]


def test_a_seed_that_has_come_apart_is_told():
    results = make_results()
    assert "finite" not in dict(findings.findings(results, summarise(results)))["Quality"]
    row = next(row for row in results["rows"] if (row["model"], row["seed"]) == ("gqa", 1))
    row["test_ppl"] = None  # as results.json has an infinite one
    quality = dict(findings.findings(results, summarise(results)))["Quality"]
    assert "Without a finite perplexity, and in no mean: gqa (1 of three seeds)." in quality
    assert "so that the mean is of the others" not in quality


def test_a_seed_without_one_of_its_other_perplexities_is_told():
    """Else a table would show the mean of the seeds that have it, as if it were that of all."""
    results = make_results()
    by_run = {(row["model"], row["seed"]): row for row in results["rows"]}
    by_run["gqa", 1]["sliding_ppl"] = None
    by_run["mqa", 2]["ppl_by_position"][-1]["ppl"] = None
    for seed in (0, 1, 2):
        ppl = None if seed == 1 else 80.0
        by_run["mqa", seed]["recurrence"] = {"ppl": ppl, "passes": [{"passes": 8, "ppl": None, "residual": 0.1}]}
    places = by_run["mqa", 2]["ppl_by_position"][-1]
    quality = dict(findings.findings(results, summarise(results)))["Quality"]
    assert quality.endswith(
        "Not finite with every seed, so that the mean is of the others: gqa (Sliding-window PPL, 1 of three seeds), "
        f"mqa (tokens {places['from']}–{places['to']}, 1 of three seeds) and mqa (true recurrence, 1 of three seeds)."
    )


def test_a_part_of_the_test_split_is_called_a_part():
    results = make_results()
    assert "Scored" not in dict(facts.facts(results))
    results["settings"]["eval_tokens"] = 60_000
    for row in results["rows"]:
        row["test_tokens"] = 59_990
    assert dict(facts.facts(results))["Scored"] == "59,990 of 78,900 test tokens (--eval-tokens)"


def test_what_differs_or_was_not_measured_is_not_told_as_if_it_were():
    results = make_results()
    assert "3,072,000 training tokens each" in facts.short_facts(results)
    results["rows"][0]["tokens"] = 1_000_000  # stopped early
    assert "1,000,000 to 3,072,000 training tokens each" in facts.short_facts(results)
    assert "0.11% of the test split's 13-word sequences" in dict(facts.facts(results))["Text"]
    results["data"]["overlap"]["test"] = None
    assert "sequences" not in dict(facts.facts(results))["Text"]


def test_what_a_model_started_from_is_told_before_and_after_distillation():
    results = make_results(1)
    for row in results["rows"]:
        row["start"] = {"source": "old", "own": [], "val_ppl": 60.0, "undistilled_val_ppl": None}
    results["rows"][1]["start"]["undistilled_val_ppl"] = 150.0
    said = dict(facts.facts(results))["Started from"]
    assert said.startswith("old; validation perplexity before training: pythia 60.00, pythia_alibi 150.00 → 60.00, ")
    results["settings"]["distil_tokens"] = 262_144
    assert "(→ after distillation on 262,144 more tokens): pythia 60.00" in dict(facts.facts(results))["Started from"]


def test_a_model_with_memories_that_has_come_apart_is_still_reported(tmp_path):
    results = make_results(1)
    layers = [{"layer": 0, "type": "infini", "gates": [0.5], "fine_open": None}]
    results["rows"][0]["memories"] = {"ppl": None, "closed_ppl": 70.0, "fine_closed_ppl": None, "layers": layers}
    markdown = report(tmp_path, results).with_suffix(".md").read_text()
    assert "| pythia | layer 0: 0.50 | — | — | — |" in markdown


def test_how_long_contexts_keep_what_they_hold_is_told_for_every_layer(tmp_path):
    results = make_results(2, 1)
    for row, median in zip(results["rows"], (1.0, 3.0), strict=True):
        layers = [
            {"layer": None, "median": median, "largest": None},
            {"layer": 1, "median": 2.5, "largest": 400.0},
        ]
        row["contexts"] = {"layers": layers}
    markdown = report(tmp_path, results).with_suffix(".md").read_text().replace("\xa0", " ")
    (line,) = [line for line in markdown.splitlines() if line.startswith("| pythia |") and "never" in line]
    median, largest = line.removeprefix("| pythia | ").removesuffix(" |").split(" | ")
    assert re.fullmatch(r"2\.0 ± [0-9.]+, 2\.5", median)
    assert largest == "never, 400"
    assert 'id="contexts"' in report(tmp_path, results).read_text()
    for row in results["rows"]:
        row["contexts"] = None
    assert "Context vectors" not in report(tmp_path, results).with_suffix(".md").read_text()


def test_wording_follows_the_intervals():
    many = make_results()
    assert "lower than the baseline pythia" in findings.headline(many, summarise(many))
    quality = dict(findings.findings(many, summarise(many)))["Quality"]
    assert re.search(r"No difference shown \(the interval includes zero\): gqa \(", quality)
    one = make_results(1)
    assert "in a single run each" in findings.headline(one, summarise(one))
    many["rows"] = [row for row in many["rows"] if (row["model"], row["seed"]) not in (("pythia", 1), ("pythia", 2))]
    said = findings.headline(many, summarise(many))
    assert said.endswith("lower than the baseline pythia, with the one seed they share."), "three seeds against one"
    assert (
        "One seed for each model cannot tell small differences"
        in dict(findings.findings(one, summarise(one)))["How sure"]
    )
    noisy = make_results(3, 2)
    for row in noisy["rows"]:
        row["test_ppl"] = {"pythia": [80, 81, 82], "pythia_alibi": [79, 82, 80]}[row["model"]][row["seed"]]
    noisy["rows"].append({**noisy["rows"][1], "seed": 1, "test_ppl": 82})
    noisy["rows"].append({**noisy["rows"][1], "seed": 2, "test_ppl": 80})
    assert "no difference to the baseline pythia is shown" in findings.headline(noisy, summarise(noisy))


@pytest.mark.parametrize("tone", ["worse", "better"])
def test_seeds_that_lie_factors_apart_are_told_by_their_ratios(tmp_path, tone, capsys):
    """Their mean ± half its interval would say that no difference is shown."""
    results = make_results(3, 3)
    ours = [row for row in results["rows"] if row["model"] == "pythia_alibi"]
    for row, factor in zip(ours, (6, 11, 19), strict=True):
        row["test_ppl"] *= factor if tone == "worse" else 1 / factor
    html = report(tmp_path, results).read_text()
    assert f'<span class="difference {tone}">' in html
    (summary,) = (summary for summary in summarise(results) if summary.model == "pythia_alibi")
    relative = difference_percent(summary.differences["test_ppl"]).replace("\u00a0", " ")
    assert re.fullmatch(r"\+\d+ % \[\+\d+, \+[\d,]+\]" if tone == "worse" else r"−9\d % \[−\d\d, −\d\d\]", relative)
    markdown = (tmp_path / "report.md").read_text().replace("\u00a0", " ")
    (row,) = re.findall(r"\| pythia\\_alibi \| 3 \| (.*?) \| (.*?) \| .* \| (.*?) \|", markdown)
    assert row[1:] == (relative, "higher" if tone == "worse" else "lower")
    assert "±" not in row[0]
    headline = findings.headline(results, summarise(results)).replace("\u00a0", " ")
    if tone == "better":
        assert headline.endswith(f": {relative} against the baseline pythia.")
    else:
        assert "pythia_alibi" not in headline
    print_table(results, table_console())
    for text in (html, markdown, capsys.readouterr().out):
        assert "geometric mean" in text


def test_a_report_without_speed_baseline_or_rows_is_still_made(tmp_path):
    results = make_results(2, 4)
    results["rows"] = [row for row in results["rows"] if row["model"] != "pythia"]
    for row in results["rows"]:
        unmeasured = (
            "train_tokens_per_second",
            "decode_ms_per_token",
            "prefill_ms",
            "peak_memory_bytes",
            "recall",
            "sample",
        )
        row |= dict.fromkeys([*unmeasured, "ppl_by_position", "sliding_ppl", "curve", "ppl_band"])
    html = report(tmp_path, results).read_text()
    assert "the baseline pythia has no valid result to compare it with" in html
    assert 'plot-loss"' not in html
    assert "There is no valid result" in report(tmp_path, results | {"rows": []}).read_text()


def test_recall_is_told_only_where_it_was_measured(tmp_path):
    without = report(tmp_path / "without", make_results())
    assert "Recall across segments" not in without.read_text() + without.with_suffix(".md").read_text()
    html = report(tmp_path / "with", make_results(recall=True))
    markdown = html.with_suffix(".md").read_text()
    assert (
        "| Model | 1 segments later | 4 segments later | 16 * segments later | Among told | Zeroed | Swapped"
        in markdown
    )
    lines = [line.split("|") for line in markdown.split("## Recall")[1].splitlines() if line.startswith("| ")]
    rows = {cells[1].strip(): cells[2:-1] for cells in lines[:5]}
    assert rows["gqa"][-1].strip() == "1,048,576"
    assert rows["pythia"][-2].strip() == "—"
    assert "Know: they call Hamlet <ring>." in markdown
    assert "**Recall.** Questions answered 16 segments after the fact: pythia 96 %, gqa 94 % (2 % with its" in markdown


def test_an_interval_says_what_it_is_over(tmp_path):
    results = make_results(recall=True)
    html = report(tmp_path, results)
    assert "±: 95 % interval over seeds. A star" in html.with_suffix(".md").read_text()
    assert "Bars are 95 % intervals over seeds. *" in html.read_text()
    results["rows"] = [row for row in results["rows"] if row["model"] != "mqa" or row["seed"] == 0]
    html = report(tmp_path, results)
    assert (
        "±: 95 % interval over seeds, of a model with one seed over the windows. A"
        in html.with_suffix(".md").read_text()
    )
    assert "Bars are 95 % intervals over seeds, of a model with one seed over the windows. *" in html.read_text()
    html = report(tmp_path, make_results(seeds=1, recall=True))
    assert "±: 95 % interval over the windows. A star" in html.with_suffix(".md").read_text()


def test_a_model_that_keeps_nothing_stands_at_zero_bytes():
    results = make_results(recall=True)
    for row in results["rows"]:
        for entry in (row["recall_across_segments"] or {"distances": []})["distances"]:
            entry["state_bytes"] *= row["model"] != "mqa"
    plot = recall_plots(summarise(results))["plot-recall-state"]
    axis = plot["layout"]["xaxis"]
    place = dict(zip(axis["ticktext"], axis["tickvals"], strict=True))
    assert [point["x"][0] for point in plot["data"]] == [2_097_152, 2_097_152, 1_048_576, place["0"]]
    assert place["0"] == min(place.values())


def test_recall_takes_knock_outs_and_intervals_from_what_was_measured():
    summaries = summarise(make_results(recall=True))
    plots = recall_plots(summaries)
    traces = plots["plot-recall"]["data"]
    roles = [(summaries[t["meta"]["model"]].model, t["meta"]["role"]) for t in traces]
    assert {role for model, role in roles if model == "pythia"} == {"line"}
    assert {role for model, role in roles if model == "mqa"} == {"line", "zeroed", "swapped"}
    for line in traces:
        assert line["x"] == ["1", "4", "16 *"]
        bars = line.get("error_y", {"array": [0] * 3, "arrayminus": [0] * 3})
        for y, up, down in zip(line["y"], bars["array"], bars["arrayminus"], strict=True):
            assert -1e-9 <= y - down <= y + up <= 100 + 1e-9
    (one,) = summarise(make_results(seeds=1, models=1, recall=True))
    value = accuracy(one, 4)
    assert value.count == 1
    assert value.half_width == pytest.approx(4, abs=1), "of one seed, the interval over its windows"
    assert recall_plots(summarise(make_results())) == {}


@needs_chromium
@pytest.mark.parametrize("width", [1280, 400])
def test_the_recall_section_is_drawn(tmp_path, width):
    html = report(tmp_path, make_results(recall=True))
    with browser(width, 900) as driver:
        open_report(driver, html)
        assert not driver.get_log("browser")
        assert overflow(driver) <= 0
        marked = driver.find_elements("css selector", "section[aria-labelledby=recall] mark")
        assert [mark.get_attribute("class") for mark in marked] == [
            "fact",
            "other-fact",
            "question",
            "answer",
            "question",
        ]
        names = driver.find_elements("css selector", "#plot-recall-state .annotation-text")
        assert {name.text for name in names} == {"pythia", "pythia_alibi", "gqa", "mqa"}
        lines = "return document.querySelectorAll('#plot-recall .scatterlayer .trace').length"
        assert driver.execute_script(lines) == 8
        gqa = "[...document.querySelectorAll('.legend button')].filter(each => each.textContent === 'gqa')"
        driver.execute_script(f"{gqa}[1].click()")
        assert driver.execute_script(lines) == 5
        pressed = f"return {gqa}.map(each => each.getAttribute('aria-pressed'))"
        assert driver.execute_script(pressed) == ["false", "false"]


def test_a_full_disk_leaves_the_report_as_it_was(tmp_path, monkeypatch):
    write_results(tmp_path, make_results(1, 1))
    write_report(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def half(path, text, **options):
        path.write_bytes(text.encode()[: len(text) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(UserError, match="no space left on the disk"):
        write_report(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda r: r["machine"].update(memory_bytes="much"), "'machine' in it"),
        (lambda r: r["settings"].update(lr="small", batch_size=[8]), "'settings' in it"),
        (lambda r: r["data"].update(splits={"train": 5}), "'data' in it"),
        (lambda r: r["rows"][1].update(recall={"repeated": "few"}), r"row 1 \(pythia_alibi, seed 0\): 'recall' in it"),
        (
            lambda r: r["rows"][1]["recall_across_segments"].update(distances=5),
            r"row 1 \(pythia_alibi, seed 0\): 'recall_across_segments' in it",
        ),
        (lambda r: r["rows"][0]["curve"][0].update(train_loss=[]), r"row 0 \(pythia, seed 0\): 'curve' in it"),
        (lambda r: r["rows"][0].update(recurrence={"ppl": 5.0, "passes": [3]}), "'recurrence' in it"),
        (
            lambda r: r["rows"][0].update(start={"source": "a", "val_ppl": "b", "undistilled_val_ppl": None}),
            "'start' in it",
        ),
    ],
)
def test_records_edited_by_hand_are_told_in_one_line(tmp_path, edit, said):
    results = make_results(1, recall=True)
    write_results(tmp_path, results)
    write_report(tmp_path)
    edit(results)
    write_results(tmp_path, results)
    with pytest.raises(UserError, match=rf"^{tmp_path}: .*{said} is not as a comparison has written it") as error:
        write_report(tmp_path)
    assert "\n" not in str(error.value)


def test_seeds_whose_records_do_not_fit_together_are_told_in_one_line(tmp_path):
    """Each by itself is as a comparison writes it; of one model, they cannot have different layers."""
    results = make_results(2, 1)
    layer = {"layer": 0, "type": "infini", "gates": [0.5], "fine_open": None}
    for count, row in enumerate(results["rows"], start=1):
        row["memories"] = {"ppl": 5.0, "closed_ppl": 6.0, "fine_closed_ppl": None, "layers": [layer] * count}
    write_results(tmp_path, results)
    with pytest.raises(UserError, match=rf"^{tmp_path}: rows side by side: something in it is not as"):
        write_report(tmp_path)


def test_results_can_be_named_themselves(tmp_path):
    path = write_results(tmp_path, make_results(1, 1))
    assert write_report(path) == write_report(tmp_path) == tmp_path / "report.html"
    with pytest.raises(UserError, match="give the folder of a comparison, or its"):
        write_report(path.rename(tmp_path / "caches.json"))


def test_one_is_no_plural():
    results = make_results()
    results["settings"]["num_layers"] = 1
    results["data"]["splits"]["test"]["documents"] = 1
    said = str(facts.facts(results))
    assert "1 layer, " in said
    assert "test 1 document, " in said


def test_a_slope_that_is_not_used_is_not_told():
    spec = create_layer({"type": "pythia", "hidden_size": 8, "num_heads": 2, "intermediate_size": 8}).spec
    assert describe_layer(spec | {"position": {"type": "alibi", "slopes": "geometric", "slope": 0.0625}}) == (
        "pythia (position=alibi geometric)"
    )
