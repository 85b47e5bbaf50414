"""docs/experiments/choose.py: only what agrees stands side by side, and what is left out is named with the reason."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from results_fixture import make_results

from newllm.experiments.statistics import Estimate

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "experiments"))
import choose
from comparable import grouped, read
from pareto_plot import MEASURES, Panel, figure, front


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=20))
def test_the_front_is_what_nothing_beats_and_beats_the_rest(places):
    found = front(places)

    def beats(a, b):
        return a != b and a[0] <= b[0] and a[1] <= b[1]

    assert not any(beats(other, place) for place in found for other in places)
    assert all(place in found or any(beats(other, place) for other in found) for place in places)


def results(models=None, seeds=3, created="2026-11-24", rows=None, **settings):
    made = make_results(seeds)
    made["rows"] = [row for row in made["rows"] if models is None or row["model"] in models]
    for row in made["rows"]:
        row |= rows or {}
    made["settings"] |= settings
    return made | {"created": f"{created}T06:30:00+00:00"}


@pytest.fixture
def put(tmp_path):
    def write(name, made):
        (tmp_path / f"{name}.json").write_text(json.dumps(made))
        return tmp_path

    return write


def choices_of(folder):
    comparisons, _ = read(folder)
    groups, missing = grouped(comparisons)
    return [{choice.summary.model: choice for choice in group.choices} for group in groups], groups, missing


def test_comparisons_on_the_same_terms_are_one_and_a_run_counts_once(put):
    put("heads", results(["pythia", "gqa"], seeds=1))
    slower = results(["pythia", "mqa"], seeds=3, created="2026-11-25")
    for row in slower["rows"]:
        row["decode_ms_per_token"] *= 10  # a busy day
    (found,), _, missing = choices_of(put("later", slower))
    assert set(found) == {"pythia", "gqa", "mqa"}
    assert {model: choice.summary.seeds for model, choice in found.items()} == {
        "pythia": [0, 1, 2], "gqa": [0], "mqa": [0, 1, 2],
    }  # fmt: skip
    assert found["mqa"].summary.differences["test_ppl"].absolute.count == 3
    assert found["pythia"].speed == 1
    assert found["gqa"].speed == pytest.approx(0.86, abs=0.05), "each by the reference of its own session"
    assert found["mqa"].speed == pytest.approx(0.78, abs=0.05)
    assert found["mqa"].megabytes == pytest.approx(1024 * 2048 / 1e6)
    assert missing == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_size": 512}, "512 wide"),
        ({"seq_length": 512, "batch_size": 4}, "windows of 512 tokens"),
        ({"recall_share": 0.95}, "95% of the steps on recall"),
        ({"lr": 0.002}, "peak learning rate 0.002"),
    ],
)
def test_other_terms_are_another_plot_or_none_and_the_page_says_why(put, change, reason):
    put("heads", results(["pythia", "gqa"]))
    two, groups, _ = choices_of(put("other", results(["pythia", "mqa"], **change)))
    assert sorted(map(sorted, two)) == [["gqa", "pythia"], ["mqa", "pythia"]]
    assert choose.title(groups[0]) in choose.page(groups, [], [])
    unmeasured = dict.fromkeys(["cache_bytes_per_token", "state_bytes", "decode_ms_per_token"])
    one, _, missing = choices_of(put("other", results(["pythia", "mqa"], rows=unmeasured, **change)))
    assert [set(group) for group in one] == [{"pythia", "gqa"}]
    assert len(missing) == 1
    assert missing[0].startswith("[other](experiments/other.md): bytes and speed were not measured")
    assert reason in missing[0]


def test_who_takes_no_part_is_named(put):
    made = results()
    for row in made["rows"]:
        row |= {"mqa": {"valid": False}, "pythia_nope": {"test_ppl": None}}.get(row["model"], {})
        if row["model"] == "gqa":
            row |= {"reconstruction": {"tokens": 1234}, "test_ppl": 1.0, "cache_bytes_per_token": 1.0}
        if (row["model"], row["seed"]) == ("pythia_alibi", 2):
            row["tokens"] = 7
    (found,), (group,), _ = choices_of(put("heads", made))
    assert {"mqa", "pythia_nope"}.isdisjoint(found)
    assert found["pythia_alibi"].summary.seeds == [0, 1]
    page = choose.page([group], [], [])
    for reason in ("`mqa`: INVALID", "`pythia_nope`: its perplexity", "`pythia_alibi`, seed 2: trained on 7 tokens"):
        assert reason in page
    assert "† gqa: a first phase on 1,234 more tokens" in page
    assert "gqa" not in group.front("ppl")
    assert group.front("ppl")


def test_what_grows_and_what_does_not_are_measured_alike(put):
    made = results(["pythia", "mqa"])
    for row in made["rows"]:
        if row["model"] == "mqa":
            row |= {"cache_bytes_per_token": 0, "state_bytes": 300_000}
    (found,), (group,), _ = choices_of(put("heads", made))
    assert found["mqa"].megabytes == pytest.approx(0.3)
    assert "mqa" in group.front("ppl")


def test_the_page_keeps_what_was_written_by_hand(put, monkeypatch):
    folder = put("heads", results())
    put("recall", make_results(recall=True) | {"created": "2026-11-25T00:00:00"})
    put("stranger", {"neither": "this nor that"})
    page = folder / "page.md"
    page.write_text("# Choose\n\nBy hand.\n\n---\n\nold\n")
    for name, value in (("HERE", folder), ("PAGE", page), ("PICTURE", folder / "none.png")):
        monkeypatch.setattr(choose, name, value)
    monkeypatch.setattr(choose.shutil, "which", lambda program: None)
    choose.main()
    first = page.read_text()
    choose.main()
    assert page.read_text() == first
    assert first.startswith("# Choose\n\nBy hand.\n\n---\n\n## Measured")
    assert "old" not in first
    assert "stranger.json: no result of `newllm compare`" in first
    assert "[recall](experiments/recall.md) | gqa | 3 | 1,048,576 | 16 |" in first
    for table in first.split("\n\n"):
        if table.startswith("|"):
            assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(50, 90)), min_size=2, max_size=30), st.booleans())
def test_every_model_is_named_within_the_plot(places, seeds):
    points = [(f"model_{i}", x, Estimate(y, 1.0 if seeds else None, 3), False) for i, (x, y) in enumerate(places)]
    best = min(y for _, y in places)
    drawn = figure(Panel("ppl", 2048, points, {"model_0"}, best))
    low, top = drawn["layout"]["yaxis"]["range"]
    shown = drawn["data"][1:]
    assert len(shown) == len(points)
    assert all(low < trace["y"][0] < top for trace in shown)
    beyond = sum(trace["marker"]["symbol"] == "triangle-up" for trace in shown)
    assert beyond == sum(y > MEASURES["ppl"].most * best for _, y in places)
    assert {note["text"].split("<br>")[0] for note in drawn["layout"]["annotations"]} == {name for name, *_ in points}
