"""Benchmarks of layers that remember in a state of fixed size. Nothing here looks at how long anything took."""

import contextlib
import copy
import json
import sys

import numpy as np
import pytest
import torch
from here_worker import HereWorker
from hypothesis import given
from hypothesis import strategies as st

from newllm.bench import growth, rounds
from newllm.bench.cumulative_sum import as_cumulative_sum
from newllm.bench.rounds import BenchWorker
from newllm.bench.settings import GrowthBench, ReadingBench
from newllm.bench.stream import Stream
from newllm.commands.bench import run
from newllm.errors import UserError
from newllm.evaluation import cache_bytes
from newllm.experiments.terminal import TABLE_WIDTH
from newllm.models import create_model
from newllm.models.layers import create_layer

LAYER = {"hidden_size": 16, "intermediate_size": 24}
SHAPE = LAYER | {"num_layers": 2, "num_heads": 4, "vocab_size": 64}
MODELS = ["pythia", "infini:segment_length=8", "infini_all:segment_length=8,memory_head_dim=4"]


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(100) % 64)
    monkeypatch.setattr(growth, "text_ids", lambda *_: str(tmp_path / "ids.npy"))
    monkeypatch.setattr(rounds, "BenchWorker", HereWorker)


def quiet(_: str) -> None:
    """No progress."""


# The rival is the same layer.


@given(
    length=st.integers(1, 20),
    segment_length=st.integers(1, 8),
    num_heads=st.sampled_from([1, 2, 4]),
    memories=st.integers(0, 2),
)
def test_the_cumulative_sum_gives_the_numbers_of_ours(length, segment_length, num_heads, memories):
    options = {"segment_length": segment_length, "num_memory_banks": memories, "segments_per_bank": 1}
    ours = create_layer({"type": "infini", "local": "linear", "num_heads": num_heads} | LAYER | options).double()
    theirs = as_cumulative_sum(copy.deepcopy(ours))
    x = torch.randn(2, length, 16, dtype=torch.float64)
    positions = torch.arange(length).expand(2, -1)
    outputs = [layer(x, positions=positions, mask=None, state=None) for layer in (ours, theirs)]
    assert torch.allclose(*outputs, rtol=1e-9, atol=1e-9)
    assert type(ours.attention) is not type(theirs.attention)


def test_the_cumulative_sum_needs_the_memory_that_the_settings_reckon_with():
    settings = ReadingBench(hidden_size=256, intermediate_size=64, seq_length=4096, batch_size=2)
    row = 4096 * 256 * 256 // 2 * 4  # of two heads: large beside embeddings, queries, keys and values
    settings.rival_gigabytes = row / 1e9
    assert settings.rival_rows(num_heads=2) == 1
    settings.rival_gigabytes = 100.0
    assert settings.rival_rows(num_heads=2) == 2
    with contextlib.closing(BenchWorker("rival")) as worker:
        spec = settings.spec("infini:local=linear,num_memory_banks=0", num_heads=2)
        worker.call("build_layer", spec=spec, cumulative_sum=True, device="cpu", threads=1, dtype="float32")
        answer = worker.call("read_layer", rows=2, length=4096, warmup=1, steps=1)
    if sys.platform == "linux":  # the peak can be reset
        assert 0.9 < answer["peak_bytes"] / (2 * row) < 1.3


# What a stream remembers.


@pytest.mark.parametrize(
    "model",
    ["infini_all", "infini_all:local=linear", "multi_memory:window=5", "sliding_window:window=4", "infini_adapter"],
)
def test_a_stream_remembers_in_as_many_bytes_as_reading_gives(model):
    model = create_model(model, **SHAPE).eval()
    text = np.arange(1000) * 7 % 64
    with torch.no_grad():
        stream = Stream(model, text, chunk=64)
        stream.read(300)
        stream.fill()
        stream.decode()
        cache = model.make_cache()
        model(torch.from_numpy(text[:301])[None], past_key_values=cache)
    assert stream.tokens == cache.get_seq_length() == 301
    assert cache_bytes(stream.cache).used == cache_bytes(cache).used


def test_memories_read_the_whole_stream_with_what_was_decoded_in_between():
    model = create_model("infini_all", **SHAPE, segment_length=8).eval()
    text = np.arange(50) * 3 % 64
    with torch.no_grad():
        stream = Stream(model, text, chunk=9)
        for tokens in (20, 40):
            stream.read(tokens)
            stream.fill()
            stream.decode()
            stream.empty()
        cache = model.make_cache()
        model(torch.from_numpy(text[:41])[None], past_key_values=cache)
    for state, expected in zip(stream.cache.layers, cache.layers, strict=True):
        for name, tensor in expected.tensors().items():
            assert torch.allclose(state.tensors()[name], tensor, atol=1e-4), name


def test_where_the_text_ends_it_begins_again():
    model = create_model("infini_all", **SHAPE, segment_length=4).eval()
    with torch.no_grad():
        streams = [Stream(model, text, chunk=6) for text in (np.arange(10), np.arange(30) % 10)]
        for stream in streams:
            stream.read(30)
    short, long = (stream.cache.layers[1].tensors()["matrix"] for stream in streams)
    assert torch.equal(short, long)


# The benchmarks.


def reading_settings(**changes) -> ReadingBench:
    small = {"seq_length": 24, "batch_size": 3, "rounds": 2, "steps": 1, "num_heads": [4, 1]}
    return ReadingBench(**LAYER | small | changes)


def test_layers_are_measured_with_equally_many_rows(capsys):
    row = 24 * 16 * 16 * 4  # of a single head
    result = run(reading_settings(rival_gigabytes=1.5 * row / 1e9))
    assert [(case["num_heads"], case["batch_size"]) for case in result["cases"]] == [(4, 3), (1, 3), (1, 1)]
    layers = ["infini:local=linear", "infini:local=softmax", "pythia"]
    for case, rival in zip(result["cases"], (True, False, True), strict=True):
        assert [row["model"] for row in case["rows"]] == ["cumulative_sum"] * rival + layers
        for row in case["rows"]:
            assert row["ms_per_row"] == pytest.approx(1000 * row["seconds"] / case["batch_size"])
            assert len(row["round_seconds"]) == 2
            assert set(row["speed_ratios"]) == set(row["less_memory"]) == {*["cumulative_sum"] * rival, layers[0]}
    *printed, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == json.loads(json.dumps(result))
    assert max(map(len, printed)) <= TABLE_WIDTH
    assert any("1 × 24, H 1" in line for line in printed)


def growth_settings(**changes) -> GrowthBench:
    small = {"marks": [40, 120], "rounds": 2, "warmup": 1, "steps": 3, "chunk": 16, "dtype": "float32"}
    return GrowthBench(**SHAPE | {"models": MODELS} | small | changes)


def test_state_is_measured_at_each_mark_and_drawn(tmp_path, capsys):
    result = run(growth_settings(plot=str(tmp_path / "growth.html")))
    assert [case["tokens"] for case in result["cases"]] == [40, 120]
    memory = create_model(MODELS[1], **SHAPE).layers[0].state_bytes(0, 4)
    narrow = 2 * create_model(MODELS[2], **SHAPE).layers[0].state_bytes(0, 4)
    for case in result["cases"]:
        keys = 2 * 16 * 4 * case["tokens"]  # of one layer
        assert [row["state_bytes"] for row in case["rows"]] == [2 * keys, memory + keys, narrow]
        for row in case["rows"]:
            assert row["state_bytes_allocated"] >= row["state_bytes"]
            assert row["ms_per_token"] == 1000 * row["seconds"]
            assert len(row["round_seconds"]) == 2
            assert set(row["speed_ratios"]) == {"pythia"}
    *printed, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == json.loads(json.dumps(result))
    assert max(map(len, printed)) <= TABLE_WIDTH
    page = (tmp_path / "growth.html").read_text(encoding="utf-8")
    for words in ("state, bytes", "milliseconds per token", "tokens read", *MODELS):
        assert words in page


def test_a_plot_may_lie_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    growth_settings(plot="~/growth.html").check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (reading_settings(layers=["pythia"]), "--layers begins with 'pythia': it must be as in infini:local=linear"),
        (reading_settings(layers=["infini:local=linear", "pithia"]), "did you mean 'pythia'"),
        (reading_settings(layers=["infini:local=linear"] * 2), "--layers names a model twice"),
        (reading_settings(rival_gigabytes=1e-6), "--rival-gigabytes is 1e-06: the cumulative sum needs more"),
        (reading_settings(num_heads=[3]), "hidden_size 16 does not divide into num_heads 3"),
        (growth_settings(models=["pithia"]), "did you mean 'pythia'"),
        (growth_settings(marks=[8, 100]), "before each there must be more than the 8 tokens"),
        (growth_settings(marks=[40, 48]), "before each there must be more than the 8 tokens"),
        (growth_settings(plot="growth.png"), "--plot is 'growth.png': it must be an .html file"),
        (growth_settings(plot="nowhere/growth.html"), "in a folder that exists"),
    ],
)
def test_wrong_settings_are_told_before_anything_starts(settings, message, monkeypatch):
    monkeypatch.setattr(rounds, "BenchWorker", None)
    with pytest.raises(UserError, match=message):
        run(settings)
