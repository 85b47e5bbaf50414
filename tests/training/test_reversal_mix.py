"""Several tasks mixed into one text: which steps, which windows, exact after an interruption, and no hash changed."""

import itertools
import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from newllm.data import prepare
from newllm.data.corpora import open_corpus
from newllm.data.reversal import load_kinds
from newllm.data.tasks import WithTasks, training_tasks
from newllm.data.windows import WindowDataset
from newllm.errors import UserError
from newllm.resolution import resolve
from newllm.settings import DataSettings, RunSettings
from newllm.training import train
from newllm.training.run import reconstruction_settings
from newllm.training.suitability import check_suitability
from newllm.training.trainer import RunSampler

KINDS = load_kinds()[3:4]


@given(
    windows=st.integers(1, 40),
    steps=st.integers(1, 80),
    batch=st.integers(1, 4),
    shares=st.lists(st.floats(0.01, 0.3), min_size=1, max_size=3),
)
def test_every_task_has_its_share_of_the_steps_and_the_text_is_read_as_without(windows, steps, batch, shares):
    order = list(RunSampler(windows, steps * batch, 0, batch, shares))
    assert len(order) == steps * batch
    by_step = [order[i : i + batch] for i in range(0, len(order), batch)]

    def task(index):
        return None if index < windows else (index - windows) % len(shares)

    assert all(len(set(map(task, step))) == 1 for step in by_step)
    for number, share in enumerate(shares):
        items = [(index - windows) // len(shares) for index in order if task(index) == number]
        assert items == list(range(len(items))), "each window of a task once, in order"
        for count in range(1, steps + 1):
            taken = sum(task(step[0]) == number for step in by_step[:count])
            assert -len(shares) < taken - count * share <= 1
    text = [index for index in order if task(index) is None]
    assert text == list(itertools.islice(RunSampler(windows, len(order), 0), len(text)))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    plays = itertools.islice(open_corpus(DataSettings()).documents(), 3)
    (folder / "plays.txt").write_text("".join(play.text[:100_000] for play in plays))
    return {"data": str(folder / "plays.txt"), "cache_dir": str(folder / "cache"), "vocab_size": 1500}


@pytest.fixture
def few_facts(monkeypatch):
    monkeypatch.setattr("newllm.data.reversal.load_kinds", lambda: KINDS)


def tiny(text, **changes):
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64}
    budget = {"seq_length": 64, "batch_size": 2, "max_tokens": 12 * 128, "evaluations": 2, "eval_tokens": 2000}
    tasks = {"recall_share": 0.3, "recall_segment": 16, "reversal_share": 0.4, "threads": 1, "precision": "float32"}
    return resolve(RunSettings(**text | shape | budget | tasks | changes))


def test_items_after_the_text_are_those_of_the_tasks_in_turn(text, few_facts):
    settings = tiny(text)
    data = prepare(settings)
    recall, reversal = tasks = training_tasks(data, settings, seed=0)
    both = WithTasks(WindowDataset(data.splits["train"], 64, samples=10), tasks)
    both.expect(12, [0.3, 0.4], items_per_step=2)
    assert len(both) == 10
    for number in range(3):
        assert torch.equal(both[10 + 2 * number]["labels"], recall[number]["labels"])
        assert torch.equal(both[11 + 2 * number]["labels"], reversal[number]["labels"])


def run(settings, folder, on_progress=None):
    train(settings, prepare(settings), folder, on_progress)
    return load_file(folder / "model" / "model.safetensors")


def test_a_run_on_two_tasks_continues_exactly(text, few_facts, tmp_path):
    whole = run(tiny(text), tmp_path / "whole")

    def interrupt(progress):
        if progress.step == 7:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tiny(text), tmp_path / "parts", interrupt)
    parts = run(tiny(text), tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    reversed_too = run(tiny(text, reversal_mode="reversed_entities"), tmp_path / "reversed")
    assert not all(torch.equal(whole[name], reversed_too[name]) for name in whole)


def test_the_first_phase_reads_text_alone(text):
    settings = reconstruction_settings(tiny(text), 100)
    assert (settings.recall_share, settings.reversal_share) == (0, 0)


def test_tasks_must_leave_steps_for_the_text(text):
    with pytest.raises(UserError, match=r"--recall-share and --reversal-share are 1\.1 together: they must be less"):
        check_suitability(tiny(text, recall_share=0.5, reversal_share=0.6), ["pythia"])
    with pytest.raises(UserError, match="--reversal-share makes windows that stand alone"):
        check_suitability(tiny(text, recall_share=0.0, streaming=True), ["pythia:window=16"])


def test_a_run_without_the_task_has_the_hash_of_always():
    """Of the versions before: results that took a night are found again by it. Another value here voids them all."""
    small = resolve(RunSettings(scale="small"))
    assert small.hash() == "715508e5a84a1402"
    assert small.hash(training_only=True) == "9ebab54fcbabc781"
    for change in ({"reversal_share": 0.3}, {"reversal_mode": "reversed_entities"}):
        assert resolve(RunSettings(scale="small", **change)).hash() != small.hash()
