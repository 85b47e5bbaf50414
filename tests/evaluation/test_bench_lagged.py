"""The benchmark of Lagged Cache Training: what it trains and reports; nothing here looks at how long anything took."""

import json

import numpy as np
import pytest
import torch

from newllm.commands.lagged_bench import quality_table, run, speed_table
from newllm.data.corpora import open_corpus
from newllm.evaluation import bench_lagged
from newllm.evaluation.bench_lagged_settings import LaggedBench, method_settings
from newllm.evaluation.worker import Work
from newllm.settings import DataSettings, UserError

SHAPE = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32, "vocab_size": 300}


def tiny(**changes):
    budget = {"batch_size": 2, "seq_length": 8, "rounds": 2, "warmup": 0, "steps": 1, "threads": 1}
    quality = {"quality_samples": 4, "quality_epochs": 1, "quality_evaluations": 1, "quality_tokens": 60}
    return LaggedBench(**SHAPE | budget | quality | {"precision": "float32"} | changes)


class HereWorker:
    """A worker without a process of its own."""

    def __init__(self, name):
        self.name, self.work = name, Work()

    def call(self, command, **arguments):
        return json.loads(json.dumps(getattr(self.work, command)(**arguments)))

    def close(self):
        """Nothing to end."""


def test_a_step_of_each_method_is_what_a_run_with_its_settings_does():
    work = Work()
    work.build({"model": "continuous_fuse"} | SHAPE, device="cpu", threads=None)
    step = {"batch_size": 2, "seq_length": 8, "precision": "float32"}
    work.train(**step, recurrence=method_settings("step_by_step"))
    assert work.lagged is None
    work = Work()
    work.build({"model": "continuous_fuse"} | SHAPE, device="cpu", threads=None)
    passes = []
    iterate = work.model.iterate
    work.model.iterate = lambda *args, **kwargs: passes.append(torch.is_grad_enabled()) or iterate(*args, **kwargs)
    work.train(**step, steps=2, recurrence=method_settings("lagged:passes=3,grad_passes=2"))
    assert passes == [False, *[False, True, True] * 2], "a discrete pass at first, then states are kept"


def test_speed_and_quality_of_every_method_are_told(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("NEWLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(bench_lagged, "Worker", HereWorker)
    # By the clock, the first method could take so long that the other is given epochs without end.
    monkeypatch.setattr(bench_lagged, "compare_rounds", fixed_times)
    play = tmp_path / "play.txt"
    play.write_text(next(iter(open_corpus(DataSettings()).documents())).text[:9000])
    np.save(tmp_path / "ids.npy", np.arange(300))
    monkeypatch.setattr(bench_lagged, "text_ids", lambda *_: str(tmp_path / "ids.npy"))
    methods = ["step_by_step", "lagged:passes=2"]
    settings = tiny(methods=methods, quality=True, data=str(play), seeds=[0, 1], samples=10)
    result = run(settings)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    (case,) = result["cases"]
    assert [row["kept_bytes"] for row in case["rows"]] == [0, 10 * 8 * 16 * 2]
    assert [row["seconds_per_epoch"] for row in case["rows"]] == [4.0 * 5, 2.0 * 5]
    records = [(r["seed"], r["method"], r["equal"], r["steps"], r["training_seconds"]) for r in result["quality"]]
    assert records == [
        (seed, *record)
        for seed in (0, 1)
        for record in [
            ("step_by_step", "epochs", 2, 8.0),
            ("lagged:passes=2", "epochs", 2, 4.0),
            ("lagged:passes=2", "time", 4, 8.0),
        ]
    ]
    assert all(line["residual"] > 0 for r in result["quality"][1:3] for line in r["curve"] if "train_loss" in line)
    assert speed_table(result).row_count == quality_table(result).row_count == 2


def fixed_times(rows, references):
    for row, seconds in zip(rows, (4.0, 2.0), strict=True):
        assert len(row.pop("rounds")) == 2
        row |= {"seconds": seconds, "speed_ratios": {references[0]: {"ratio": 4 / seconds, "range": [1.0, 2.0]}}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "pythia"}, "--model pythia feeds no state back"),
        ({"methods": ["lagd"]}, "unknown method 'lagd'"),
        ({"methods": ["lagged:pases=2"]}, "unknown option 'pases' .* 'passes'"),
        ({"methods": ["lagged:grad_passes=2"]}, "--lagged-grad-passes is 2"),
        ({"methods": ["lagged", "lagged"]}, "twice"),
        ({"seeds": []}, "--seeds is empty"),
        ({"rounds": 0}, "--rounds is 0"),
    ],
)
def test_wrong_input_is_told_before_anything_starts(changes, words):
    with pytest.raises(UserError, match=words):
        tiny(**changes).check()
