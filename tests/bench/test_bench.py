"""Benchmarks: what they measure and against whom. Nothing here looks at how long anything took."""

import contextlib
import json
import platform
import sys

import numpy as np
import pytest
import torch
from here_worker import HereWorker
from hypothesis import given
from hypothesis import strategies as st

from newllm.bench import rounds, worker
from newllm.bench.decode import bench_decode
from newllm.bench.memory import bench_memory
from newllm.bench.rivals import NAMES, build_rival, rival_cache
from newllm.bench.settings import BenchSettings, DecodeBench, MemoryBench, TrainBench
from newllm.bench.train import bench_train
from newllm.bench.worker import BenchWork, build_subject, weight_bytes
from newllm.commands.bench import measuring, run, table
from newllm.errors import UserError
from newllm.evaluation import cache_bytes
from newllm.experiments.terminal import TABLE_WIDTH
from newllm.models import create_model

SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 96, "vocab_size": 96}
MODELS = ["pythia", "mqa:window=9", "pythia:cache_precision=int8"]
SUBJECTS = [{"model": m} for m in [*MODELS, "infini_all:segment_length=5", "infini_adapter:segment_length=5"]]
SUBJECTS += [{"rival": r, "max_positions": 64, "kv_lora_rank": 16} for r in NAMES]


def quiet(_: str) -> None:
    """No progress."""


def work_on(**subject) -> BenchWork:
    work = BenchWork()
    work.build(subject | SHAPE, device="cpu", threads=None)
    work.infer("float32")
    return work


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(rounds, "BenchWorker", HereWorker)


def test_in_a_log_everything_that_is_measured_has_its_line(capsys):
    with measuring() as progress:
        progress("round 1, pythia")
        progress("round 1, rival [24 GB]")
    assert capsys.readouterr().err.splitlines() == ["round 1, pythia", "round 1, rival [24 GB]"]


# The rivals.


def test_gpt_neox_has_the_weights_of_ours():
    subjects = BenchSettings(**SHAPE, models=["pythia"], rivals=["gpt_neox", "gpt_neox_static"]).subjects(64)
    assert len({sum(p.numel() for p in build_subject(subject).parameters()) for subject in subjects}) == 1


@pytest.mark.parametrize("rank", [64, 128])
def test_deepseek_caches_one_latent_and_its_rotary_part_and_has_about_the_weights_of_ours(rank):
    shape = {"hidden_size": 512, "num_layers": 1, "num_heads": 8, "intermediate_size": 2048, "vocab_size": 64}
    settings = BenchSettings(**shape, models=[], rivals=["deepseek_v3"], kv_lora_rank=rank)
    model = build_subject(*settings.subjects(64)).eval()
    with torch.no_grad():
        cache = model(torch.randint(64, (1, 10)), use_cache=True).past_key_values
    assert cache_bytes(cache).used == 10 * (rank + 16) * 4
    ours = sum(p.numel() for p in create_model("pythia", **shape).parameters())
    theirs = sum(p.numel() for p in model.parameters())
    assert theirs == pytest.approx(ours, rel=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_rivals_decode_with_their_cache_as_without(name):
    model = build_rival(name, 64, kv_lora_rank=16, **SHAPE).eval()
    cache = rival_cache(name, model, 24)
    ids = torch.randint(96, (2, 20))
    with torch.no_grad():
        for chunk in ids.split([15, 1, 1, 1, 1, 1], dim=1):
            logits = model(chunk, past_key_values=cache, use_cache=True).logits
        assert torch.allclose(logits, model(ids).logits[:, -1:], atol=1e-5)


# Filling a cache in a moment.


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_filled_cache_is_the_one_that_reading_gives(subject):
    work = work_on(**subject)
    ids = torch.randint(96, (1, 12))
    work._tokens = lambda *_: ids
    with torch.no_grad():
        work._fill(rows=3, context=12, chunk=50, capacity=14)
        filled = work.cache
        step = torch.randint(96, (3, 1))
        logits = work.model(step, past_key_values=filled, use_cache=True).logits
        expected = work.model(torch.cat([ids.expand(3, -1), step], dim=1)).logits[:, -1:]
    tolerance = 1e-2 if "int8" in str(subject) else 1e-5
    assert torch.allclose(logits, expected, atol=tolerance)


@given(
    subject=st.sampled_from(SUBJECTS),
    rows=st.integers(1, 3),
    context=st.integers(1, 40),
    chunk=st.integers(1, 50),
)
def test_a_filled_cache_costs_what_reading_costs(subject, rows, context, chunk):
    work = work_on(**subject)
    with torch.no_grad():
        work._fill(rows, context, chunk, capacity=context)
        filled = work.cache
        ids = torch.randint(96, (rows, context))
        read = rival_cache(work.rival, work.model, context) if work.rival else work.model.make_cache()
        work.model(ids, past_key_values=read, use_cache=True)
    assert int(filled.get_seq_length()) == int(read.get_seq_length()) == context
    assert cache_bytes(filled) == cache_bytes(read)


# What a step must read.


@given(rows=st.integers(1, 9), tied=st.booleans())
def test_of_the_input_embedding_a_step_reads_a_row_for_each_token(rows, tied):
    model = create_model("pythia", **SHAPE, tie_word_embeddings=tied)
    others = sum(p.nbytes for name, p in model.named_parameters() if name != "embed.weight")
    lookup = model.embed.weight.nbytes if tied else rows * 32 * 4
    assert weight_bytes(model, rows) == others + lookup


def test_bandwidth_is_that_of_the_fastest_reduction(monkeypatch):
    times = iter([[0.5, 0.4], [0.25, 0.3], [0.6]])
    monkeypatch.setattr(worker, "repeat", lambda step, device, seconds: next(times))
    assert BenchWork().bandwidth("cpu", None, megabytes=3, seconds=1)["bytes_per_second"] == 3 * 2**20 / 0.25


# The three benchmarks.


def test_the_text_serves_a_vocabulary_of_any_size(tmp_path):
    """Also one that does not fit into the two bytes in which its ids are kept."""
    for vocab_size in (64, 100_000):
        assert np.load(rounds.text_ids(tmp_path, vocab_size, quiet)).max() < vocab_size


def test_training_is_compared_with_rivals_and_the_first_model(here):
    settings = TrainBench(
        **SHAPE | {"vocab_size": 4096}, models=["pythia", "mqa"], seq_lengths=[8, 16], batch_size=2, rounds=3, steps=1
    )
    result = bench_train(settings, quiet)
    assert result["references"] == ["gpt_neox", "pythia"]
    for case, length in zip(result["cases"], [8, 16], strict=True):
        assert [row["model"] for row in case["rows"]] == ["gpt_neox", "pythia", "mqa"]
        theirs, ours, mqa = case["rows"]
        assert ours["tokens_per_second"] == pytest.approx(2 * length / ours["seconds"])
        assert ours["memory_ratios"]["gpt_neox"] == ours["peak_bytes"] / theirs["peak_bytes"]
        low, high = mqa["speed_ratios"]["pythia"]["range"]
        assert low <= mqa["speed_ratios"]["pythia"]["ratio"] <= high
        assert mqa["speed_ratios"]["pythia"]["ratio"] in [
            a / b for a, b in zip(ours["round_seconds"], mqa["round_seconds"], strict=True)
        ]


def test_models_are_also_trained_without_our_kernels(here, monkeypatch):
    started, build = {}, HereWorker.__init__
    monkeypatch.setattr(
        HereWorker,
        "__init__",
        lambda self, name, environment=None: build(self, name) or started.update({name: environment}),
    )
    settings = TrainBench(
        **SHAPE | {"vocab_size": 4096},
        models=["pythia"],
        rivals=[],
        seq_lengths=[8],
        rounds=1,
        steps=1,
        without_kernels=True,
    )
    (case,) = bench_train(settings, quiet)["cases"]
    assert started == {"pythia": None, "pythia, torch's operators": {"NEWLLM_NATIVE": "0"}}
    assert [row["model"] for row in case["rows"]] == list(started)
    assert set(case["rows"][1]["speed_ratios"]) == {"pythia"}


def decode_settings(**changes) -> DecodeBench:
    values = {"contexts": [12, 20], "batch_sizes": [1, 2], "rounds": 2, "steps": 2, "seconds": 0.01}
    return DecodeBench(**SHAPE | {"models": MODELS, "ceiling_megabytes": 1} | values | changes)


def test_decoding_is_measured_in_both_types_for_each_batch_and_context(here):
    result = bench_decode(decode_settings(), quiet)
    assert [(c["batch_size"], c["context"]) for c in result["cases"]] == [(1, 12), (1, 20), (2, 12), (2, 20)]
    assert result["ceiling_bytes_per_second"] == max(result["ceiling_rounds"])
    assert len(result["ceiling_rounds"]) == 4 * 2
    for case in result["cases"]:
        rows = case["rows"]
        assert [(r["model"], r["dtype"]) for r in rows] == [
            (m, d) for m in [*NAMES, *MODELS] for d in ("bfloat16", "float32")
        ]
        for half, full in zip(rows[::2], rows[1::2], strict=True):
            assert half["best"] is not full["best"]
            assert full["weight_bytes"] == 2 * half["weight_bytes"]
            assert half["best"] is (half["seconds"] < full["seconds"])
            for row in (half, full):
                assert set(row["speed_ratios"]) == {*NAMES, "pythia"}
                for name, ratio in row["speed_ratios"].items():
                    reference = next(r for r in rows if r["model"] == name and r["best"])
                    rounds = zip(reference["round_seconds"], row["round_seconds"], strict=True)
                    ratios = sorted(theirs / ours for theirs, ours in rounds)
                    assert ratio == {"ratio": pytest.approx(sum(ratios) / 2), "range": ratios}  # two rounds
                read = (row["weight_bytes"] + row["cache_bytes"]) / row["seconds"]
                assert row["ceiling_share"] == pytest.approx(read / result["ceiling_bytes_per_second"])
                assert row["tokens_per_second"] == pytest.approx(1000 * case["batch_size"] / row["ms_per_step"])
        neox = next(row for row in rows if row["model"] == "gpt_neox" and row["dtype"] == "float32")
        # The warm-up and the measured steps, of which there may be one or two each, have been read too.
        per_token = case["batch_size"] * 2 * 2 * 32 * 4
        assert case["context"] + 2 <= neox["cache_bytes"] / per_token <= case["context"] + 5


def test_steps_of_the_warm_up_are_not_counted():
    work = work_on(model="pythia")
    arguments = {"dtype": "float32", "rows": 1, "context": 8, "chunk": 8}
    answer = work.decode_filled(**arguments, warmup=2, steps=3, seconds=60.0)
    assert len(answer["seconds"]) == 3
    assert answer["cache_bytes"] == (8 + 2 + 3) * 2 * 2 * 32 * 4
    assert len(work.decode_filled(**arguments, warmup=2, steps=3, seconds=1e-9)["seconds"]) == 1


def test_there_need_not_be_a_warm_up(here):
    settings = decode_settings(models=["pythia"], rivals=[], contexts=[12], batch_sizes=[1], warmup=0, steps=1)
    for row in bench_decode(settings, quiet)["cases"][0]["rows"]:
        assert row["cache_bytes"] == (12 + 1) * 2 * 2 * 32 * (2 if row["dtype"] == "bfloat16" else 4)


def test_memory_is_that_of_the_cache_at_the_end_of_each_context_in_a_fresh_process(monkeypatch):
    started = []

    def start(name: str, environment: None) -> HereWorker:
        started.append(name)
        return HereWorker(name)

    monkeypatch.setattr(rounds, "BenchWorker", start)
    settings = MemoryBench(**SHAPE, models=MODELS, contexts=[64, 16], steps=4, dtype="float32")
    result = bench_memory(settings, quiet)
    assert [case["context"] for case in result["cases"]] == [16, 64]
    assert started == [*NAMES, *MODELS] * 2
    for case in result["cases"]:
        rows = {row["model"]: row for row in case["rows"]}
        assert list(rows) == [*NAMES, *MODELS]
        assert rows["pythia"]["cache_bytes_per_token"] == rows["gpt_neox"]["cache_bytes_per_token"] == 2 * 2 * 32 * 4
        assert rows["mqa:window=9"]["cache_bytes"] == 8 * 2 * 2 * 8 * 4
        assert rows["pythia:cache_precision=int8"]["cache_bytes"] < rows["pythia"]["cache_bytes"] / 2
        for row in rows.values():
            assert row["cache_bytes_allocated"] >= row["cache_bytes"]


# What is printed, and what is refused.


def test_a_table_of_100_columns_then_one_line_of_json(here, capsys):
    long = "mqa:window=9,position.type=alibi,position.slopes=geometric"
    settings = decode_settings(models=["pythia", long], contexts=[12], batch_sizes=[1])
    result = run(settings)
    *printed, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == json.loads(json.dumps(result))
    assert max(map(len, printed)) <= TABLE_WIDTH
    assert "batch 1, 12 tokens" in "\n".join(printed)
    assert not any("…" in line for line in printed)
    every = table(result | {"settings": result["settings"] | {"all_precisions": True}})
    assert (table(result).row_count, every.row_count) == (1 + 5, 1 + 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (TrainBench(models=["pithia"]), "did you mean 'pythia'"),
        (TrainBench(models=[]), "--models is empty"),
        (TrainBench(seq_lengths=[]), "--seq-lengths is empty"),
        (TrainBench(seq_lengths=[8, 10**9]), "a window of 1,000,000,000 tokens is too long"),
        (DecodeBench(contexts=[]), "--contexts is empty"),
        (DecodeBench(batch_sizes=[]), "--batch-sizes is empty"),
        (MemoryBench(contexts=[]), "--contexts is empty"),
        (DecodeBench(rivals=["gpt_neo"]), "unknown rival 'gpt_neo' in --rivals: did you mean 'gpt_neox'"),
        (DecodeBench(warmup=-1), "--warmup is -1: it must be at least 0"),
        (TrainBench(models=["pythia", "pythia"]), "--models names a model twice: pythia pythia"),
        (DecodeBench(rivals=["gpt_neox", "gpt_neox"]), "--rivals names a model twice: gpt_neox gpt_neox"),
        (TrainBench(rounds=0), "--rounds is 0: it must be at least 1"),
        (DecodeBench(seconds=0.0), "--seconds is 0.0: it must be more than 0"),
        (DecodeBench(batch_sizes=[1, 0]), "--batch-sizes is .*: it must be at least 1"),
        (MemoryBench(contexts=[8]), "each must be more than --steps 8"),
    ],
)
def test_wrong_settings_are_told_before_anything_starts(settings, message, monkeypatch):
    monkeypatch.setattr(rounds, "BenchWorker", None)
    kinds = {TrainBench: bench_train, DecodeBench: bench_decode, MemoryBench: bench_memory}
    with pytest.raises(UserError, match=message):
        kinds[type(settings)](settings, quiet)


def test_what_was_measured_before_is_not_in_the_memory_without_a_cache(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shape = SHAPE | {"hidden_size": 256, "num_layers": 4}
    with contextlib.closing(rounds.BenchWorker("pythia")) as process:
        process.call("build", subject={"model": "pythia"} | shape, device="cpu", threads=1)
        work = {"dtype": "float32", "chunk": 256, "steps": 4}
        short, long = (process.call("decode_memory", context=context, **work) for context in (512, 2048))
    assert long["used"] == 2048 * 4 * 2 * 256 * 4
    if sys.platform == "linux":  # the peak can be reset
        assert 1 < (long["peak_bytes"] - long["resident_bytes"]) / long["used"] < 2
    if platform.libc_ver()[0] == "glibc":  # what is freed can be given back
        assert long["resident_bytes"] == pytest.approx(short["resident_bytes"], abs=2e6)
