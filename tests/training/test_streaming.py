"""Streaming training: rows read whole documents with a carried state, and interrupting a run changes nothing."""

import multiprocessing
import os
import signal
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch
from safetensors.torch import load_file
from tiny_runs import metrics, run

from newllm.cli import main
from newllm.data import prepare
from newllm.data.corpora import open_corpus
from newllm.data.windows import StreamDataset
from newllm.errors import UserError
from newllm.models.layers import LAYER_TYPES
from newllm.settings import DataSettings, RunSettings
from newllm.training import new_model

PLUGIN = str(Path(__file__).parents[2] / "examples" / "my_layer.py")
# A window of keys, a recurrent state, and compressive memories; no window or segment ends where a chunk does.
MIXED = "infini:window=20,segment_length=12"
MODELS = ("pythia:window=20", "my_layer", MIXED, "infini_all:segment_length=12")


@pytest.fixture(scope="module", autouse=True)
def _plugin():
    from newllm.models import load_plugin

    load_plugin(PLUGIN)
    yield
    LAYER_TYPES.pop("my_layer", None)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Documents of very different lengths."""
    folder = tmp_path_factory.mktemp("text")
    play = next(iter(open_corpus(DataSettings()).documents())).text
    for number, (begin, end) in enumerate(pairwise([0, 2_400, 2_520, 2_870, 2_970, 4_370, 4_870, 5_570])):
        (folder / f"part{number}.txt").write_text(play[begin:end])
    return folder


def tiny(text, **changes):
    own = {"batch_size": 3, "max_tokens": None, "epochs": 2, "streaming": True}
    shares = {"validation_share": 0.1, "test_share": 0.1}
    return tiny_runs.tiny(text, **{"data": str(text)} | own | shares | changes)


def outcome(folder):
    """What a run leaves that does not depend on the clock."""
    lines = metrics(folder)
    for line in lines:
        line.pop("seconds")
    return lines, (folder / "model" / "model.safetensors").read_bytes()


def losses_of_whole_parts(model, streams, tokens, passes):
    """For each batch the sum of its losses and their number, from reading at once all that a row reads without a reset.

    What the trainer does chunk by chunk, said in the other way: no state, no cache.
    """
    B, T = streams.batch_size, streams.seq_length
    total, count = np.zeros(passes * streams.batches), np.zeros(passes * streams.batches)
    for row in range(B):
        chunks = [streams[batch * B + row] for batch in range(passes * streams.batches)]
        firsts = [n for n, chunk in enumerate(chunks) if chunk["starts"]] + [len(chunks)]
        for first, after in pairwise(firsts):
            ids = torch.cat([chunk["input_ids"][chunk["attention_mask"]] for chunk in chunks[first:after]])
            with torch.no_grad():
                losses = model.token_losses(ids[None])[0].numpy()  # of ids[1:]
            for p, loss in enumerate(losses):
                if (p + 1) % T:  # the first token of a chunk is not predicted
                    total[first + (p + 1) // T] += loss
                    count[first + (p + 1) // T] += 1
    return total, count


@pytest.mark.parametrize(("model", "accumulation"), [*((model, 1) for model in MODELS), (MIXED, 3)])
def test_every_batch_is_read_with_all_that_stands_before_it_in_its_document(text, tmp_path, model, accumulation):
    settings = tiny(text, model=model, lr=1e-12, gate_lr=1e-12, gradient_accumulation=accumulation)
    result = run(settings, tmp_path / "run")
    data = prepare(settings)
    streams = StreamDataset(data.splits["train"], settings.seq_length, settings.batch_size, settings.seed)
    assert result.steps == -(-2 * streams.batches // accumulation)
    torch.manual_seed(settings.seed)
    untrained = new_model(settings, data).eval()
    total, count = losses_of_whole_parts(untrained, streams, data.splits["train"], passes=2)
    for number, line in enumerate(line for line in metrics(tmp_path / "run") if "train_loss" in line):
        part = slice(number * accumulation, (number + 1) * accumulation)
        if (number + 1) * accumulation <= len(total):  # else the step reaches into a third pass
            assert line["train_loss"] == pytest.approx(total[part].sum() / max(count[part].sum(), 1), abs=1e-5)


def test_windows_and_streams_differ(text, tmp_path):
    for streaming in (False, True):
        run(tiny(text, model="my_layer", streaming=streaming, epochs=1), tmp_path / str(streaming))
    assert outcome(tmp_path / "False")[1] != outcome(tmp_path / "True")[1]


def test_no_gradient_goes_back_beyond_a_batch(text, tmp_path, monkeypatch):
    from newllm.models.cache import LMCache

    detach = LMCache.detach_

    def watched(cache):
        assert any(tensor.requires_grad for state in cache.layers for tensor in state.tensors().values())
        detach(cache)
        assert not any(tensor.requires_grad for state in cache.layers for tensor in state.tensors().values())

    monkeypatch.setattr(LMCache, "detach_", watched)
    run(tiny(text, model="my_layer", epochs=0.2), tmp_path / "run")


@pytest.mark.parametrize("model", ["my_layer", MIXED])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(text, tmp_path, model):
    def interrupt_at(step):
        def on_progress(progress):
            if progress.step == step:
                signal.raise_signal(signal.SIGINT)

        return on_progress

    settings = tiny(text, model=model, precision="bf16")
    whole = run(settings, tmp_path / "whole")
    for step in (5, whole.steps // 2 + 3):
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path / "parts", interrupt_at(step))
    run(settings, tmp_path / "parts")
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
    assert not list((tmp_path / "parts").rglob("states.safetensors"))


def test_a_killed_run_ends_as_an_uninterrupted_one(text, tmp_path):
    def child(step):
        def on_progress(progress):
            if progress.step == step:
                os.kill(os.getpid(), signal.SIGKILL)

        run(settings, tmp_path / "parts", on_progress)

    settings = tiny(text, model="infini_all:segment_length=12", gradient_accumulation=2, checkpoint_minutes=0, epochs=1)
    whole = run(settings, tmp_path / "whole")
    for step in (3, whole.steps - 2):
        process = multiprocessing.get_context("fork").Process(target=child, args=(step,))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        assert list((tmp_path / "parts").glob("checkpoint-*/states.safetensors"))
    run(settings, tmp_path / "parts")
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_a_step_without_targets_has_no_loss_and_changes_little(tmp_path):
    """Rows that end in a single token have nothing to predict; 0 / 0 would end the run."""
    (tmp_path / "text").mkdir()
    words = "abcdefgh " * 100
    for number in range(4):
        (tmp_path / "text" / f"{number}.txt").write_text(words)
    settings = tiny(tmp_path / "text", model="my_layer", batch_size=1, vocab_size=260, epochs=1)
    data = prepare(settings)
    length = int(np.diff(data.splits["train"].document_starts)[0])
    seq_length = next(T for T in range(50, 1, -1) if length % T == 1)
    settings = tiny(tmp_path / "text", model="my_layer", batch_size=1, vocab_size=260, epochs=1, seq_length=seq_length)
    run(settings, tmp_path / "run")
    losses = [line["train_loss"] for line in metrics(tmp_path / "run") if "train_loss" in line]
    assert 0.0 in losses
    assert all(np.isfinite(losses))
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("pythia", "layer 0 of pythia .* give it a window, as in pythia:window=128"),
        ("gqa:num_kv_heads=1", "give it a window, as in gqa:num_kv_heads=1,window=128"),
        ("infini", "layer 1 of infini .* give it a window, as in infini:window=128"),
        ("infini_adapter", "layer 0 of infini_adapter .* give it a window, as in infini_adapter:window=128"),
        ("mla", "a layer of type 'mla' has no window; train this model without --streaming"),
    ],
)
def test_a_state_that_grows_without_end_is_refused(text, tmp_path, capsys, model, words):
    with pytest.raises(UserError, match=words):
        run(tiny(text, model=model), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for command in (["train", "--model", model], ["compare", "--models", "pythia:window=9", model]):
        assert main([*command, "--streaming", "true", "--out", str(tmp_path / "out")]) == 2
        assert "keeps every token it reads" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_streams_have_no_recall_windows(text, tmp_path):
    with pytest.raises(UserError, match="--streaming reads documents from beginning to end, --recall-share"):
        run(tiny(text, model="my_layer", recall_share=0.5), tmp_path / "run")


def test_without_streaming_a_run_has_the_hash_of_always(text):
    assert tiny(text, streaming=False).hash() != tiny(text, streaming=True).hash()
    plain = RunSettings()
    assert plain.hash() == RunSettings(streaming=False).hash()


def test_an_epoch_of_samples_is_a_budget(text, tmp_path):
    assert run(tiny(text, model="my_layer", samples=12, epochs=3), tmp_path / "run").steps == 12
