"""Training on facts and questions beside plain text: which steps, which windows, exact after an interruption."""

import itertools
import json
import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from newllm.data import prepare
from newllm.data.corpora import open_corpus
from newllm.errors import UserError
from newllm.resolution import resolve
from newllm.settings import DataSettings, RunSettings
from newllm.training import train
from newllm.training.run import reconstruction_settings
from newllm.training.trainer import RunSampler


@given(
    windows=st.integers(1, 40),
    steps=st.integers(1, 60),
    batch=st.integers(1, 6),
    share=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 3),
)
def test_a_share_of_whole_steps_takes_new_recall_windows(windows, steps, batch, share, seed):
    order = list(RunSampler(windows, steps * batch, seed, batch, [share]))
    assert len(order) == steps * batch
    by_step = [order[i : i + batch] for i in range(0, len(order), batch)]
    recall = [index for index in order if index >= windows]
    assert recall == list(range(windows, windows + len(recall)))
    assert all(len({index >= windows for index in step}) == 1 for step in by_step), "a step is all recall or all text"
    assert len(recall) == batch * int(steps * share)
    for count in range(1, steps):
        assert abs(sum(step[0] >= windows for step in by_step[:count]) - count * share) <= 1
    # The text is read as it would be without recall.
    text = [index for index in order if index < windows]
    assert text == list(itertools.islice(RunSampler(windows, len(order), seed), len(text)))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    plays = itertools.islice(open_corpus(DataSettings()).documents(), 3)
    (folder / "plays.txt").write_text("".join(play.text[:100_000] for play in plays))
    return {"data": str(folder / "plays.txt"), "cache_dir": str(folder / "cache"), "vocab_size": 1500}


def tiny(text, **changes):
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64}
    budget = {"seq_length": 64, "batch_size": 2, "max_tokens": 12 * 128, "evaluations": 2, "eval_tokens": 2000}
    recall = {"recall_share": 0.5, "recall_segment": 16, "threads": 1, "precision": "float32"}
    return resolve(RunSettings(**text | shape | budget | recall | changes))


def run(settings, folder, on_progress=None):
    result = train(settings, prepare(settings), folder, on_progress)
    return result, load_file(folder / "model" / "model.safetensors")


def test_a_run_on_the_mix_continues_exactly(text, tmp_path):
    settings = tiny(text)
    result, whole = run(settings, tmp_path / "whole")
    assert result.tokens == settings.max_tokens

    def interrupt(progress):
        if progress.step == 7:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "parts", interrupt)
    _, parts = run(settings, tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    _, text_alone = run(tiny(text, recall_share=0.0), tmp_path / "text")
    assert not all(torch.equal(whole[name], text_alone[name]) for name in whole)


def test_the_loss_of_a_recall_step_is_the_mean_over_its_answers(text, tmp_path):
    """However few there are: split into micro-batches, a step trains the same."""
    losses = {}
    for name, parts in (("one", {"batch_size": 4}), ("parts", {"batch_size": 1, "gradient_accumulation": 4})):
        run(tiny(text, max_tokens=8 * 256, recall_share=0.9, **parts), tmp_path / name)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [loss for line in lines if (loss := json.loads(line).get("train_loss"))]
    assert losses["one"] == pytest.approx(losses["parts"], rel=1e-3)


def test_the_first_phase_reads_text_alone(text):
    assert reconstruction_settings(tiny(text), 100).recall_share == 0


def test_segments_too_long_for_the_windows_are_one_line(text, tmp_path):
    with pytest.raises(UserError, match=r"--recall-segment is 48: .* at most 32 is possible"):
        run(tiny(text, recall_segment=48), tmp_path / "run")
