"""The benchmark of Lagged Cache Training: what it trains and reports; nothing here looks at how long anything took."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from here_worker import HereWorker

from newllm.bench import lagged, rounds
from newllm.bench.lagged import compare_quality, steps_within
from newllm.bench.lagged_settings import LaggedBench, method_settings
from newllm.bench.rounds import compare_rounds
from newllm.bench.worker import BenchWork
from newllm.commands.bench_lagged import quality_table, run, speed_table
from newllm.commands.lagged_plot import quality_figure
from newllm.data import prepare
from newllm.data.corpora import open_corpus
from newllm.errors import UserError
from newllm.evaluation.perplexity import token_weighted_loss
from newllm.experiments.results import finite
from newllm.settings import DataSettings
from newllm.training import trainer

SHAPE = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32, "vocab_size": 300}


def tiny(**changes):
    budget = {"batch_size": 2, "seq_length": 8, "rounds": 2, "warmup": 0, "steps": 1, "threads": 1}
    quality = {"quality_samples": 4, "quality_epochs": 1, "quality_evaluations": 1, "quality_tokens": 60}
    return LaggedBench(**SHAPE | budget | quality | {"precision": "float32"} | changes)


def test_a_step_of_each_method_is_what_a_run_with_its_settings_does():
    work = BenchWork()
    work.build({"model": "continuous_fuse"} | SHAPE, device="cpu", threads=None)
    step = {"batch_size": 2, "seq_length": 8, "precision": "float32"}
    work.train(**step, recurrence=method_settings("step_by_step"))
    assert work.lagged is None
    work = BenchWork()
    work.build({"model": "continuous_fuse"} | SHAPE, device="cpu", threads=None)
    passes = []
    iterate = work.model.iterate
    work.model.iterate = lambda *args, **kwargs: passes.append(torch.is_grad_enabled()) or iterate(*args, **kwargs)
    work.train(**step, steps=2, recurrence=method_settings("lagged:passes=3,grad_passes=2"))
    assert passes == [False, *[False, True, True] * 2], "a discrete pass at first, then states are kept"


def test_deeper_steps_are_taken_by_themselves_and_discrete_passes_too():
    work = BenchWork()
    assert work.build({"model": "continuous_fuse"} | SHAPE, device="cpu", threads=None)["recurrent"]
    passes = []
    iterate = work.model.iterate
    work.model.iterate = lambda *args, **kwargs: passes.append(torch.is_grad_enabled()) or iterate(*args, **kwargs)
    step = {"batch_size": 2, "seq_length": 8, "precision": "float32"}
    recurrence = method_settings("lagged:passes=2,deep_share=0.3,deep_passes=3")
    work.train(**step, steps=12, recurrence=recurrence)
    assert passes == [False, *[False, True] * 12]
    passes.clear()
    work.train(**step, steps=2, recurrence=recurrence, deep=True)
    assert passes == [True] * 6
    passes.clear()
    assert len(work.discrete(**step, steps=2)["seconds"]) == 2
    assert passes == [False] * 2


def test_rare_steps_count_by_their_share():
    usual = [[1.0, 1.0, 9.0], [2.0, 2.0, 2.0]]
    rows = [
        {"model": "plain", "rounds": usual},
        {"model": "deep", "rounds": usual, "rare_rounds": [[5.0], [6.0]], "rare_share": 0.25},
    ]
    compare_rounds(rows, ["plain"])
    assert [row["seconds"] for row in rows] == [2.0, 0.75 * 2.0 + 0.25 * 5.5]
    assert [row["round_seconds"] for row in rows] == [[1.0, 2.0], [0.75 * 1 + 0.25 * 5, 0.75 * 2 + 0.25 * 6]]
    assert rows[1]["speed_ratios"]["plain"]["range"] == [1 / 2.0, 2 / 3.0]


SECONDS = {"step_by_step": 4.0, "lagged:passes=2": 2.0, "lagged:deep_share=0.5,deep_passes=3": 1.0}


class ClockedWorker(HereWorker):
    """One whose clock shows SECONDS for a step, three times as much for a deeper one and half for a discrete pass."""

    def call(self, command, **arguments):
        answer = super().call(command, **arguments)
        if "seconds" in answer:
            factor = 0.5 if command == "discrete" else 3.0 if arguments["deep"] else 1.0
            answer["seconds"] = [factor * SECONDS[self.name]] * len(answer["seconds"])
        return answer


def test_speed_and_quality_of_every_method_are_told(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("NEWLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(rounds, "BenchWorker", ClockedWorker)
    play = tmp_path / "play.txt"
    play.write_text(next(iter(open_corpus(DataSettings()).documents())).text[:9000])
    np.save(tmp_path / "ids.npy", np.arange(300))
    monkeypatch.setattr(lagged, "text_ids", lambda *_: str(tmp_path / "ids.npy"))
    settings = tiny(
        methods=list(SECONDS), quality=True, data=str(play), seeds=[0, 1], samples=10, quality_epochs=2, steps=2
    )
    page = tmp_path / "lagged.html"
    result = run(dataclasses.replace(settings, plot=str(page)))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert all(method in page.read_text() for method in SECONDS)
    (case,) = result["cases"]
    assert [row["kept_bytes"] for row in case["rows"]] == [0, 10 * 8 * 16 * 2, 10 * 8 * 16 * 2]
    assert [row["seconds"] for row in case["rows"]] == [4.0, 2.0, 2.0]
    assert [row["discrete_seconds"] for row in case["rows"]] == [0.0, 1.0, 0.5]
    assert [row["seconds_per_epoch"] for row in case["rows"]] == [4.0 * 5, 2.0 * 5, 2.0 * 5]
    records = [(r["seed"], r["method"], r["equal"], r["steps"], r["training_seconds"]) for r in result["quality"]]
    assert records == [  # four windows are an epoch of two steps, each with a discrete pass in the first
        (seed, *record)
        for seed in (0, 1)
        for record in [
            ("step_by_step", "epochs", 4, 16.0),
            ("lagged:passes=2", "epochs", 4, 4 * 2.0 + 2 * 1.0),
            ("lagged:passes=2", "time", 7, 7 * 2.0 + 2 * 1.0),
            ("lagged:deep_share=0.5,deep_passes=3", "epochs", 4, 4 * 2.0 + 2 * 0.5),
            ("lagged:deep_share=0.5,deep_passes=3", "time", 8, 8 * 2.0 + 2 * 0.5),
        ]
    ]
    assert all(line["residual"] > 0 for r in result["quality"][1:5] for line in r["curve"] if "train_loss" in line)
    assert speed_table(result).row_count == quality_table(result).row_count == 3


def test_a_text_that_is_not_there_is_told_before_anything_is_timed(monkeypatch):
    monkeypatch.setattr(rounds, "BenchWorker", None)
    with pytest.raises(UserError, match=r"nothing\.txt: no such file or folder"):
        run(tiny(quality=True, data="nothing.txt"))


def test_a_method_can_be_left_out_of_the_runs_at_equal_time(monkeypatch, tmp_path):
    monkeypatch.setenv("NEWLLM_CACHE", str(tmp_path))
    play = tmp_path / "play.txt"
    play.write_text(next(iter(open_corpus(DataSettings()).documents())).text[:9000])
    settings = tiny(
        methods=["step_by_step", "lagged", "lagged:passes=2"], quality_untimed=["lagged:passes=2"], data=str(play)
    )
    rows = [{"model": method, "seconds": 1.0, "discrete_seconds": 0.0} for method in settings.methods]
    records = compare_quality(settings, rows, lambda _: None)
    assert [(record["method"], record["equal"]) for record in records] == [
        ("step_by_step", "epochs"),
        ("lagged", "epochs"),
        ("lagged", "time"),
        ("lagged:passes=2", "epochs"),
    ]
    result = {"settings": dataclasses.asdict(settings), "references": ["step_by_step"], "quality": finite(records)}
    equal_epochs, equal_time = (list(quality_table(result).columns[column].cells) for column in (1, 3))
    assert float(equal_epochs[2]) > 1
    assert equal_time[2] == "—"


def test_curves_are_means_over_seeds_and_a_run_without_an_end_has_no_point():
    def record(method, equal, seed, losses, test_ppl, seconds=60.0):
        curve = [{"step": step, "val_loss": loss} for step, loss in zip((2, 4), losses, strict=False)]
        ends = {"steps": 4, "training_seconds": seconds, "test_ppl": test_ppl}
        return {"method": method, "equal": equal, "seed": seed, "curve": [{"step": 1}, *curve], **ends}

    records = [
        *(record("step_by_step", "epochs", seed, (3.0, 2.0), 10.0, seconds=240.0) for seed in (0, 1)),
        record("lagged", "epochs", 0, (3.0, 2.0), 11.0),
        record("lagged", "epochs", 1, (4.0, 1.0), 13.0),
        record("lagged:passes=2", "epochs", 0, (3.0,), None),
        record("lagged:passes=2", "epochs", 1, (5.0, 1.0), 9.0),
    ]
    settings = {"methods": ["step_by_step", "lagged", "lagged:passes=2"]}
    traces = quality_figure({"settings": settings, "quality": records}).data
    curves = {trace.name: trace for trace in traces if trace.name and trace.x}
    assert list(curves["step_by_step"].x) == [2.0, 4.0]
    assert list(curves["lagged"].x) == [0.5, 1.0]
    assert list(curves["lagged"].y) == pytest.approx([math.exp(3.5), math.exp(1.5)])
    assert list(curves["lagged:passes=2"].y) == pytest.approx([math.exp(4.0)])
    (difference,) = [trace for trace in traces if trace.xaxis == "x2"]
    assert (difference.y, difference.x) == (("lagged",), (pytest.approx(20.0),))
    assert difference.error_x.array[0] == pytest.approx(12.706 * 10, rel=1e-3)  # of 10 % and 30 %: t · s / √2


@pytest.mark.parametrize(("seconds", "steps"), [(0.1, 1), (3.0, 2), (15.0, 10), (25.0, 20), (26.4, 21)])
def test_as_many_steps_are_taken_as_a_time_holds(seconds, steps):
    row = {"seconds": 1.0, "discrete_seconds": 0.5}
    assert steps_within(row, seconds, epoch=10) == steps


def test_every_run_validates_equally_often_and_is_judged_on_a_text_that_chose_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("NEWLLM_CACHE", str(tmp_path))
    play = tmp_path / "play.txt"
    play.write_text(next(iter(open_corpus(DataSettings()).documents())).text[:9000])
    methods = ["step_by_step", "lagged"]
    settings = tiny(methods=methods, data=str(play), quality_evaluations=3, quality_epochs=2, quality_tokens=10_000)
    rows = [{"model": method, "seconds": s, "discrete_seconds": 0.0} for method, s in zip(methods, (8, 1), strict=True)]
    splits = prepare(settings.run_settings("lagged", 0, steps=1)).splits
    judged = []

    def score(model, tokens, run):
        judged.append((tokens, token_weighted_loss(model, splits["validation"], run)))
        return token_weighted_loss(model, tokens, run)

    monkeypatch.setattr(lagged, "token_weighted_loss", score)
    records = compare_quality(settings, rows, lambda _: None)
    assert [record["steps"] for record in records] == [4, 4, 32]
    assert [sum("val_loss" in line for line in record["curve"]) for record in records] == [3, 3, 3]
    for record, (tokens, validation) in zip(records, judged, strict=True):
        best = min(line["val_loss"] for line in record["curve"] if "val_loss" in line)
        assert validation == pytest.approx(best), "the weights are those that were kept"
        assert record["val_ppl"] == pytest.approx(math.exp(best))
        assert np.array_equal(tokens.ids, splits["test"].ids)


def test_a_run_that_diverges_is_a_result_and_ends_no_other(monkeypatch, tmp_path):
    monkeypatch.setenv("NEWLLM_CACHE", str(tmp_path))
    play = tmp_path / "play.txt"
    play.write_text(next(iter(open_corpus(DataSettings()).documents())).text[:9000])
    settings = tiny(methods=["step_by_step", "lagged"], data=str(play), quality_epochs=1, seeds=[0, 1])
    rows = [{"model": method, "seconds": 1.0, "discrete_seconds": 0.0} for method in settings.methods]

    def diverging(model, tokens, run):
        return math.inf if run.seed and not run.step_by_step else token_weighted_loss(model, tokens, run)

    monkeypatch.setattr(trainer, "token_weighted_loss", diverging)
    records = compare_quality(settings, rows, lambda _: None)
    assert [record["test_ppl"] == math.inf for record in records] == [False] * 4 + [True] * 2
    assert all(record["curve"][-1]["val_loss"] for record in records)
    result = {"settings": dataclasses.asdict(settings), "references": ["step_by_step"], "quality": finite(records)}
    columns = [list(column.cells) for column in quality_table(result).columns]
    assert columns[0] == ["step_by_step", "lagged"]
    for perplexities, differences in (columns[1:3], columns[3:5]):
        assert [perplexities[1], differences[1]] == ["∞ (1 of 2)", "—"]
        assert "±" in perplexities[0]


def test_an_infinite_perplexity_of_the_first_method_leaves_no_difference():
    records = [{"method": "step_by_step", "seed": 0, "equal": "epochs", "epochs": 1.0, "test_ppl": None}]
    records += [records[0] | {"method": "lagged", "equal": equal, "test_ppl": 9.0} for equal in ("epochs", "time")]
    settings = dataclasses.asdict(tiny(methods=["step_by_step", "lagged"]))
    columns = quality_table({"settings": settings, "references": ["step_by_step"], "quality": records}).columns
    assert [list(column.cells) for column in columns[1:3]] == [["∞ (1 of 1)", "9.00"], ["", "—"]]


def test_epochs_that_differ_from_seed_to_seed_are_all_told():
    """As where results of seeds that were measured apart are joined: each has an equal time of its own."""
    records = [
        {"method": method, "seed": seed, "equal": equal, "epochs": epochs, "test_ppl": 9.0}
        for seed, then in enumerate((12.19, 11.64, 11.82))
        for method, equal, epochs in (
            ("step_by_step", "epochs", 1.5),
            ("lagged", "epochs", 1.5),
            ("lagged", "time", then),
        )
    ]
    settings = dataclasses.asdict(tiny(methods=["step_by_step", "lagged"], seeds=[0, 1, 2]))
    table = quality_table({"settings": settings, "references": ["step_by_step"], "quality": records})
    assert list(table.columns[5].cells) == ["1.5", "11.6–12.2"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "pythia"}, "--model pythia feeds no state back"),
        ({"methods": ["lagd"]}, "^unknown method 'lagd'"),
        ({"plot": "lagged.png"}, "--plot is 'lagged.png': it must be an .html file"),
        ({"plot": "lagged.html"}, "--plot lagged.html draws the runs of --quality true"),
        ({"quality_untimed": ["step_by_step"]}, "^--quality-untimed names step_by_step: give those of --methods after"),
        ({"methods": ["lagged:pases=2"]}, "unknown option 'pases' .* 'passes'"),
        ({"methods": ["lagged:grad_passes=2"]}, "^method 'lagged:grad_passes=2': --lagged-grad-passes is 2"),
        (
            {"methods": ["lagged:passes=two"]},
            "^method 'lagged:passes=two': passes is 'two': it must be a whole number, as in .*passes=2$",
        ),
        ({"methods": ["lagged:passes=1.5"]}, "passes is '1.5': it must be a whole number"),
        ({"methods": ["lagged:passes=true"]}, "passes is 'true': it must be a whole number"),
        ({"methods": ["lagged:passes"]}, "passes is '': it must be a whole number, as in lagged:passes=2"),
        ({"methods": ["lagged:passes=0"]}, "--lagged-passes is 0: it must be greater than 0"),
        ({"methods": ["lagged:deep_share=x"]}, "deep_share is 'x': it must be a number, as in lagged:deep_share=0.1"),
        ({"methods": ["lagged:deep_share=1"]}, r"must lie in \[0, 1\)"),
        ({"methods": ["lagged:deep_share=nan"]}, r"must lie in \[0, 1\)"),
        (
            {"methods": ["step_by_step:passes=2"]},
            "step_by_step has no options; those of lagged are as in lagged:passes=2",
        ),
        ({"methods": ["lagged:step_by_step=true"]}, "unknown option 'step_by_step'"),
        ({"methods": ["lagged:passes=8,deep_share=0.1"]}, "--lagged-deep-passes is 4: .* it must be at least 8"),
        ({"quality": True, "quality_evaluations": 3}, "--quality-evaluations is 3: .* no more than the 2 steps"),
        ({"methods": ["lagged", "lagged"]}, "twice"),
        ({"seeds": []}, "--seeds is empty"),
        ({"rounds": 0}, "--rounds is 0"),
    ],
)
def test_wrong_input_is_told_before_anything_starts(changes, words):
    with pytest.raises(UserError, match=words) as error:
        tiny(**changes).check()
    assert "\n" not in str(error.value)
