import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from results_fixture import make_results
from rich.console import Console

from newllm.errors import UserError
from newllm.experiments.columns import ALL_COLUMNS, LEAD, MAIN_COLUMNS
from newllm.experiments.figures import difference_percent, number
from newllm.experiments.results import check_taken_row, read_results, write_results
from newllm.experiments.statistics import estimate, paired_difference, t_probability, t_quantile
from newllm.experiments.summary import best_models, decimals, ranked, summarise
from newllm.experiments.terminal import print_table

CACHE = ALL_COLUMNS["cache_bytes_per_token"]


def by_name(results):
    return {summary.model: summary for summary in summarise(results)}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tokens": None}, "has 'tokens' = 'None': it must be a number"),
        ({"seconds": "long"}, "has 'seconds' = 'long': it must be a number"),
        ({"hash": 5}, "has 'hash' = '5': it must be text"),
        ({"valid": None}, "has 'valid' = 'None': it must be true or false"),
        ({"curve": [5]}, "item 0 of 'curve' must be an object"),
    ],
)
def test_a_row_edited_by_hand_is_not_taken_over(change, complaint):
    row = make_results()["rows"][0] | {"hash": "a"}
    check_taken_row(row | {"test_ppl": None}, "x.json: row")
    with pytest.raises(UserError, match=rf"^x.json: row .*{complaint}"):
        check_taken_row(row | change, "x.json: row")


@pytest.mark.parametrize(
    ("degrees", "expected"),  # two-sided 95 %, from published tables
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (10, 2.228), (30, 2.042), (60, 2.000), (120, 1.980)],
)
def test_t_quantile_has_the_published_values(degrees, expected):
    assert t_quantile(degrees) == pytest.approx(expected, abs=6e-4)


@given(degrees=st.integers(1, 200), confidence=st.floats(0.01, 0.999))
def test_t_quantile_inverts_the_distribution(degrees, confidence):
    assert t_probability(t_quantile(degrees, confidence), degrees) == pytest.approx(confidence, abs=1e-9)


def test_interval_of_known_numbers():
    value = estimate([1.0, 2.0, 3.0])  # standard error 1/sqrt(3)
    assert value.mean == 2
    assert value.half_width == pytest.approx(4.303 / 3**0.5, abs=1e-3)


def test_one_seed_has_no_interval_and_no_verdict():
    assert estimate([5.0]).half_width is None
    assert paired_difference({0: 5.0}, {0: 4.0}).verdict == "one seed: cannot tell"


def test_pairing_by_seed_sees_what_the_intervals_of_the_means_hide():
    baseline = {0: 100.0, 1: 80.0, 2: 120.0}
    better = {seed: 0.98 * ppl for seed, ppl in baseline.items()}
    assert estimate(better.values()).half_width > 20
    difference = paired_difference(better, baseline)
    assert difference.percent.mean == pytest.approx(-2)
    assert difference.percent.half_width == pytest.approx(0, abs=1e-9)
    assert difference.verdict == "lower"


def test_a_difference_whose_interval_includes_zero_is_not_shown():
    difference = paired_difference({0: 101.0, 1: 99.0, 2: 101.0}, {0: 100.0, 1: 100.0, 2: 100.0})
    assert difference.verdict == "no difference shown"


def test_seeds_that_lie_factors_apart_show_the_difference_that_each_of_them_has():
    baseline = {0: 104.0, 1: 110.0, 2: 107.0}
    worse = {0: 639.0, 1: 1227.0, 2: 2072.0}
    difference = paired_difference(worse, baseline)
    assert not difference.percent.excludes_zero
    assert difference.verdict == "higher"
    mirrored = paired_difference(baseline, worse)  # who is called the baseline decides nothing
    assert mirrored.verdict == "lower"
    low, high = (math.exp(mirrored.log_ratio.mean + side * mirrored.log_ratio.half_width) for side in (-1, 1))
    ratios = [worse[seed] / baseline[seed] for seed in baseline]
    assert low < 1 / statistics.geometric_mean(ratios) < high < 1
    assert difference_percent(difference).replace("\u00a0", " ") == "+1,000 % [+160, +4,500]"
    assert [round(100 * (ratio - 1), -2) for ratio in (statistics.geometric_mean(ratios), 1 / low)] == [1000, 4500]


@pytest.mark.parametrize(
    ("values", "shown", "verdict"),
    [
        ([116.8, 136.9, 119.2], "+24 % [+0.0, +54]", "higher"),
        ([81.6, 78.8], "−20 % [−36, +0.1]", "no difference shown"),
        ([100.0, 1e48], "+1.0e+25 % [−100, +∞]", "no difference shown"),
        ([100.0, 104.0], "+2.0 % [−21, +31]", "no difference shown"),
        ([101.0, 103.0, 102.0], "+2.0 % ± 2.5", "no difference shown"),
    ],
)
def test_the_interval_that_is_shown_is_the_one_that_decides(values, shown, verdict):
    difference = paired_difference(dict(enumerate(values)), dict.fromkeys(range(len(values)), 100.0))
    assert difference_percent(difference).replace("\u00a0", " ") == shown
    assert difference.verdict == verdict


def test_values_that_are_zero_have_no_ratio_and_are_compared_as_they_are():
    difference = paired_difference({0: 0.0, 1: 0.0}, {0: 3.0, 1: 3.0})
    assert difference.log_ratio is None
    assert difference.verdict == "lower"
    assert difference_percent(difference) == "−100.0\u00a0%"


def test_only_shared_seeds_are_paired():
    assert paired_difference({0: 1.0, 1: 2.0}, {1: 4.0, 2: 9.0}).percent.mean == -50
    assert paired_difference({0: 1.0}, {1: 4.0}) is None


def test_write_then_read_is_the_same_and_leaves_no_other_file(tmp_path):
    results = make_results()
    write_results(tmp_path, results)
    assert read_results(tmp_path) == results
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_diverged_run_is_written_as_null_and_has_no_perplexity(tmp_path):
    results = make_results(1, 2)
    results["rows"][1] |= {"test_ppl": float("inf"), "val_loss": float("nan")}
    write_results(tmp_path, results)
    assert "NaN" not in (tmp_path / "results.json").read_text()
    summaries = summarise(read_results(tmp_path))
    assert summaries[1].values[LEAD.key] is None
    assert ranked(summaries)[-1].model == summaries[1].model
    assert summaries[1].model not in best_models(summaries, LEAD)


def test_summary_per_model_over_seeds():
    summaries = by_name(make_results())
    assert [len(s.rows) for s in summaries.values()] == [3, 3, 3, 3, 3, 1]
    assert summaries["pythia"].differences[LEAD.key] is None
    assert summaries["pythia_alibi"].differences[LEAD.key].verdict == "lower"
    assert summaries["mqa"].differences[CACHE.key].percent.mean == -75
    assert list(summaries.values())[-1].values[LEAD.key].half_width is None


def test_a_figure_measured_once_for_each_model_has_no_interval():
    results = make_results()
    figures = {row["model"]: row["decode_ms_per_token"] for row in results["rows"]}
    for row in results["rows"]:
        row["decode_ms_per_token"] = None if (row["model"], row["seed"]) == ("gqa", 0) else figures[row["model"]]
    column = ALL_COLUMNS["decode_ms_per_token"]
    for model, summary in by_name(results).items():
        assert summary.values[column.key] == estimate([figures[model]])
        if not summary.is_baseline:
            difference = summary.differences[column.key]
            assert difference.absolute.mean == figures[model] - figures["pythia"]
            assert difference.verdict == "one seed: cannot tell"


def test_invalid_runs_are_never_best_and_are_not_compared():
    results = make_results()
    for row in results["rows"]:
        if row["model"] == "pythia_alibi" and row["seed"] == 1:
            row |= {"valid": False, "test_ppl": 1.5}
    summaries = summarise(results)
    invalid = by_name(results)["pythia_alibi"]
    assert not invalid.valid
    assert invalid.differences[LEAD.key] is None
    assert ranked(summaries)[-1].model == "pythia_alibi"
    assert best_models(summaries, LEAD) == {"pythia"}


def test_an_invalid_baseline_compares_with_nothing():
    results = make_results()
    for row in results["rows"]:
        row["valid"] = row["model"] != "pythia"
    assert all(s.differences[LEAD.key] is None for s in summarise(results))


def test_best_marks_ties_and_marks_nothing_when_all_are_equal():
    summaries = summarise(make_results(models=4))
    assert best_models(summaries, CACHE) == {"gqa"}
    assert best_models(summaries[:3], CACHE) == set()
    assert best_models(summarise(make_results(models=3)), ALL_COLUMNS["parameters"]) == set()


@pytest.mark.parametrize("column", MAIN_COLUMNS, ids=lambda column: column.key)
def test_every_column_is_explained_and_prints_sensible_decimals(column):
    summaries = summarise(make_results())
    assert len(column.explanation) > 40
    text = number(summaries[0].mean(column), decimals(summaries, column))
    assert 3 <= len(text.replace(",", "").replace(".", "")) <= 5


@pytest.mark.parametrize(
    ("value", "places", "text"),
    [
        (2852864.0, 0, "2,852,864"),
        (59.634, 2, "59.63"),
        (-0.4, 1, "\u22120.4"),
        (26946844821.994, 3, "2.7e+10"),
        (8.2e274, 0, "8.2e+274"),
    ],
)
def test_a_figure_has_the_digits_that_can_be_read(value, places, text):
    assert number(value, places) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("rows"), "is not a result of `newllm compare`: the file has no 'rows'"),
        (lambda r: r["rows"][2].pop("model"), "row 2 has no 'model'"),
        (
            lambda r: r["rows"][1].update(test_ppl="low"),
            r"row 1 \(pythia_alibi, seed 0\) has 'test_ppl' = 'low'.*number",
        ),
        (lambda r: r["rows"][0].update(valid="yes"), "'valid' = 'yes': it must be true or false"),
        (lambda r: r["rows"][0].update(seed=True), "'seed' = 'True'"),
        (lambda r: r["rows"][0]["checks"][0].pop("detail"), "item 0 of 'checks' has no 'detail'"),
        (lambda r: r["rows"][0].update(curve=[3]), "item 0 of 'curve' must be an object, not int"),
        (lambda r: r["failed"].append({"model": "x"}), "failed run 1 has no 'seed'"),
        (lambda r: r.update(settings=[]), "'settings' = .* must be an object"),
        (lambda r: r["rows"].append(r["rows"][1]), r"row 6 \(pythia_alibi, seed 0\) is the same run as row 1"),
        (lambda r: r["rows"][0].update(memories={"ppl": 60.0}), r"row 0 .*: 'memories' has no 'closed_ppl'"),
        (lambda r: r["rows"][0].update(reused={"from": "x"}), r"'reused' has no 'created'"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path, change, message):
    results = make_results(1)
    change(results)
    write_results(tmp_path, results)
    with pytest.raises(UserError, match=message) as error:
        read_results(tmp_path)
    assert "results.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_what_json_has_no_number_for_is_none(tmp_path, value):
    """We write null: a file that other software has written again may have one of these."""
    results = make_results(1)
    results["rows"][0]["test_ppl"] = "here"
    write_results(tmp_path, results)
    path = tmp_path / "results.json"
    path.write_text(path.read_text().replace('"here"', value))
    with pytest.raises(UserError, match=r"row 0 .* has 'test_ppl' = '(nan|inf)': it must be a number"):
        read_results(tmp_path)


def test_missing_truncated_and_foreign_files(tmp_path):
    with pytest.raises(UserError, match=r"results\.json does not exist"):
        read_results(tmp_path)
    path = write_results(tmp_path, make_results(1))
    path.write_text(path.read_text()[:5000])
    with pytest.raises(UserError, match=r"not valid JSON .*cut off"):
        read_results(tmp_path)
    path.write_text(json.dumps([1, 2]))
    with pytest.raises(UserError, match="must be an object, not list"):
        read_results(tmp_path)
    for content in (b"\xff\xfe\x00", b"[" * 100_000, b'{"rows": ' + b"1" * 5_000 + b"}"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is not text that a comparison has written"):
            read_results(tmp_path)


@pytest.mark.parametrize(("seeds", "models"), [(1, 1), (3, 6), (5, 15)])
def test_terminal_table_fits_100_columns(seeds, models):
    results = make_results(seeds, models)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_table(results, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert all(row["model"][:10] in text for row in results["rows"])
    assert "failed mixer_from_plugin, seed 1" in text
