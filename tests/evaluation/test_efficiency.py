"""Cache bytes from live tensors, and measurements of trained models in worker processes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from newllm.evaluation import cache_bytes, efficiency
from newllm.evaluation.efficiency import KEYS, cache_figures, measure_all
from newllm.evaluation.processes import Worker, WorkerError
from newllm.evaluation.worker import Work
from newllm.models import ContinuousLM, create_model
from newllm.resolution import resolve
from newllm.settings import LaggedSettings, RunSettings

SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64, "vocab_size": 96}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@given(tokens=st.integers(1, 40), rows=st.integers(1, 3), kv_heads=st.sampled_from([1, 2, 4]))
def test_our_cache_is_measured_from_its_tensors(tokens, rows, kv_heads):
    model = create_model("pythia", num_kv_heads=kv_heads, **SHAPE).eval()
    with torch.no_grad():
        cache = model(torch.randint(96, (rows, tokens)), use_cache=True).past_key_values
        used = rows * 2 * 2 * kv_heads * 8 * 4 * tokens  # layers, keys and values, heads, head size, bytes
        assert cache_bytes(cache) == (used, used)
        model(torch.randint(96, (rows, 1)), past_key_values=cache)
    grown = cache_bytes(cache)
    assert grown.used == used // tokens * (tokens + 1)
    assert grown.used <= grown.allocated <= max(1.25 * grown.used, used // tokens * (tokens + 2))


def test_a_foreign_cache_is_measured_too():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8), 0)
    assert cache_bytes(cache) == (640, 640)


def test_a_shared_storage_counts_once_and_a_view_holds_all_of_it():
    cache = DynamicCache()
    buffer = torch.zeros(2, 1, 2, 100, 8)
    cache.update(torch.zeros(1, 2, 0, 8), torch.zeros(1, 2, 0, 8), 0)
    cache.layers[0].keys, cache.layers[0].values = buffer[0, :, :, :10], buffer[1, :, :, :10]
    assert cache_bytes(cache) == (2 * 2 * 10 * 8 * 4, buffer.nbytes)


@pytest.mark.parametrize(
    ("used", "per_token", "state"),
    [
        (lambda tokens: 8 * tokens, 8, 0),
        (lambda tokens: 500, 0, 500),
        (lambda tokens: 500 + 8 * tokens, 8, 500),  # layers of both kinds
        (lambda tokens: 8 * min(tokens, 400), 0, 3200),
        (lambda tokens: 8 * min(tokens, 700), 8 * 700 / 1024, 0),
        (lambda tokens: 8 * min(tokens, 900), 8 * 900 / 1024, 0),
    ],
)
def test_what_grows_with_the_context_is_told_from_what_does_not(used, per_token, state):
    measured = {tokens: {"used": used(tokens), "allocated": used(tokens) + 32} for tokens in (512, 768, 1024)}
    figures = cache_figures(measured)
    assert (figures["cache_bytes_per_token"], figures["state_bytes"]) == (per_token, state)
    assert per_token <= figures["cache_bytes_allocated_per_token"] <= per_token + 1


def test_trained_models_are_measured_side_by_side(tmp_path):
    models = {"full": {}, "window": {"window": 9}}
    for name, options in models.items():
        create_model("pythia", **SHAPE, **options).save_pretrained(tmp_path / name / "model")
    settings = resolve(
        RunSettings(
            seq_length=16, batch_size=2, decode_context=32, efficiency_seconds=0.1, precision="float32", threads=1
        )
    )
    full, window, missing = measure_all([tmp_path / "full", tmp_path / "window", tmp_path / "missing"], settings)
    for result in (full, window):
        assert set(result) == set(KEYS)
        assert result["efficiency_error"] is None
        assert all(result[key] is not None for key in KEYS if key != "efficiency_error")
        assert result["peak_memory_bytes"] > 50e6
        assert result["decode_dtype"] == "float32"
    per_token = 2 * 2 * 32 * 4  # keys and values, layers, D, bytes
    assert (full["cache_bytes_per_token"], full["state_bytes"]) == (per_token, 0)
    assert per_token <= full["cache_bytes_allocated_per_token"] <= 1.25 * per_token + 16
    assert (window["cache_bytes_per_token"], window["state_bytes"]) == (0, 8 * per_token)
    assert "no model in" in missing["efficiency_error"]
    assert missing["train_tokens_per_second"] is None


class HereWorker:
    """A worker without a process of its own, whose deeper steps take 9 seconds, and all else 1."""

    def __init__(self, name):
        self.work = Work()

    def call(self, command, **arguments):
        answer = getattr(self.work, command)(**json.loads(json.dumps(arguments)))
        return answer | ({"seconds": [9.0 if arguments.get("deep") else 1.0]} if "seconds" in answer else {})

    def close(self):
        """Nothing to end."""


@pytest.mark.parametrize(
    ("lagged", "gradients", "seconds"),
    [
        ({}, [True], 1.0),
        ({"lagged_passes": 3, "lagged_grad_passes": 2}, [False, True, True], 1.0),
        ({"lagged_deep_share": 0.25, "lagged_deep_passes": 2}, [True], 0.75 * 1 + 0.25 * 9),
        ({"step_by_step": True, "lagged_deep_share": 0.25}, [True] * 16, 1.0),
    ],
)
def test_training_is_measured_by_the_steps_that_a_recurrent_model_was_trained_with(
    tmp_path, monkeypatch, lagged, gradients, seconds
):
    for name in ("pythia", "continuous_fuse"):
        create_model(name, **SHAPE).save_pretrained(tmp_path / name / "model")
    passes = []
    iterate = ContinuousLM.iterate

    def watched(model, input_ids, *args, **kwargs):
        if model.training:
            passes.append((input_ids.shape[1], torch.is_grad_enabled()))
        return iterate(model, input_ids, *args, **kwargs)

    monkeypatch.setattr(ContinuousLM, "iterate", watched)
    monkeypatch.setattr(efficiency, "Worker", HereWorker)
    monkeypatch.setattr(efficiency, "ROUNDS", 1)
    small = {"seq_length": 16, "batch_size": 2, "decode_context": 8, "efficiency_seconds": 1e-6}
    settings = resolve(RunSettings(**small, precision="float32", **lagged))
    results = measure_all([tmp_path / "pythia", tmp_path / "continuous_fuse"], settings)
    assert [result["efficiency_error"] for result in results] == [None, None]
    speeds = [result["train_tokens_per_second"] for result in results]
    assert speeds == pytest.approx([32.0, 32.0 / seconds])
    step_by_step = lagged.get("step_by_step", False)
    assert {length for length, _ in passes} == {1 if step_by_step else 16}
    kinds = [True] * 2 if lagged.get("lagged_deep_share") and not step_by_step else []
    one_more = [] if step_by_step else [False]  # the discrete pass of a window's first step
    begin, warmup_and_step = gradients + kinds, 2 * gradients + 2 * kinds
    assert [gradient for _, gradient in passes] == one_more + begin + warmup_and_step


@pytest.mark.parametrize(
    ("model", "frozen"), [("pythia", ()), ("v_dproj_restore_two_phase", ("compress", "expand")), ("dproj", ("cell",))]
)
def test_a_measured_step_trains_what_a_step_of_the_run_trained(tmp_path, model, frozen):
    create_model(model, **SHAPE).save_pretrained(tmp_path / "model")
    work = Work()
    recurrent = work.build({"folder": str(tmp_path)}, "cpu", 1)["recurrent"]
    recurrence = dataclasses.asdict(LaggedSettings()) if recurrent else None
    work.train(batch_size=2, seq_length=16, precision="float32", recurrence=recurrence)
    for name, parameter in work.model.named_parameters():
        assert (parameter in work.optimizer.state) != any(part in name for part in frozen), name


def test_a_measured_step_of_lagged_cache_training_needs_no_trainer():
    code = "import sys, newllm.evaluation.lagged_work; sys.exit('transformers.trainer' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_dead_worker_is_one_clear_line():
    worker = Worker("gqa")
    try:
        with pytest.raises(WorkerError, match=r"^gqa: build: unknown model 'gqua'"):
            worker.call("build", subject={"model": "gqua"}, device="cpu", threads=1)
        os.kill(worker.process.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"^gqa: train: the process was killed \(signal 9\): out of") as error:
            worker.call("train")
        assert "\n" not in str(error.value)
    finally:
        worker.close()


def test_a_worker_ends_with_its_driver():
    worker = Worker("pythia")
    worker.process.stdin.close()
    assert worker.process.wait(timeout=60) == 0
