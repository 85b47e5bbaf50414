"""Lagged Cache Training: the truth in the limit, the plain method in one pass, and a run that can be interrupted."""

import itertools
import multiprocessing
import os
import signal
from itertools import pairwise

import pytest
import tiny_runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import excerpt, metrics, run
from toy_recurrent import SHAPE, TOY, lively, recurrent_presets, toy
from transformers import TrainerControl, TrainerState

from newllm.data import prepare
from newllm.data.tasks import stack_windows, task_of_each_step
from newllm.data.windows import WindowDataset
from newllm.errors import UserError
from newllm.evaluation.perplexity import token_weighted_loss
from newllm.models import create_model, load_model
from newllm.models.factory import PLUGIN_PRESETS
from newllm.models.recurrent import RecurrentLM
from newllm.settings import RunSettings
from newllm.training import new_model, train
from newllm.training.callbacks import FlowCallback, Schedule
from newllm.training.lagged_cache import KeyedWindows, LaggedTraining, is_deep, lagged_loss
from newllm.training.lagged_store import FILE, STATES, UNDO_LOG, MappedLaggedCache, lagged_cache

MODELS = ["toy", *recurrent_presets()]
STEP = 4 * 16  # tokens of an optimizer step
STORES = pytest.mark.parametrize("memory", [1.0, 1e-9], ids=["memory", "file"])


def lagged_reference(model, input_ids, labels, states, passes, grad_passes):
    """The loss with T positions moved on one by one, and the states."""
    T = input_ids.shape[1]
    positions = torch.arange(T).expand_as(input_ids)
    for number in range(passes):
        if number <= passes - grad_passes:
            states = states.detach()
        lagged = torch.zeros_like(states)
        for t in range(1, T):
            lagged[:, t] = states[:, t - 1]
        hidden, states = model.iterate(input_ids, lagged, positions=positions)
    logits = model.head(hidden[:, :-1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()), states


def gradients(model, loss):
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)


def start(model, ids):
    with torch.no_grad():
        return model.first_states(ids, torch.arange(ids.shape[1]).expand_as(ids))


@pytest.mark.parametrize("name", MODELS)
def test_as_many_passes_as_tokens_have_the_loss_and_gradient_of_step_by_step(name):
    model = toy() if name == "toy" else create_model(name, **SHAPE | {"num_layers": 3})
    model = lively(model).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = torch.randint(60, (2, 7))
    truth = model(input_ids=ids, labels=ids).loss
    loss, _, _ = lagged_loss(model, ids, ids, start(model, ids), 7, 7)
    torch.testing.assert_close(loss, truth, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(gradients(model, loss), gradients(model, truth), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_a_single_pass_teaches_all_weights_but_those_of_a_state_that_only_later_tokens_read(name):
    model = toy() if name == "toy" else create_model(name, **SHAPE | {"num_layers": 3})
    ids = torch.randint(60, (2, 7))

    def taught(grad_passes):
        loss, _, _ = lagged_loss(model, ids, ids, start(model, ids), 2, grad_passes)
        return {n for (n, _), g in zip(model.named_parameters(), gradients(model, loss), strict=True) if g.any()}

    assert (taught(1) != taught(2)) == model.state_learns_from_later_tokens == (name == "context_vector")


@settings(max_examples=10)
@given(passes=st.integers(1, 4), grad_passes=st.integers(1, 4), length=st.integers(2, 9))
def test_passes_are_what_they_are_said_to_be(passes, grad_passes, length):
    model = lively(toy()).double()
    ids = torch.randint(60, (2, length))
    states = torch.randn(2, length, 16, dtype=torch.float64)
    loss, after, residual = lagged_loss(model, ids, ids, states, passes, grad_passes)
    assert not residual.requires_grad
    expected, expected_states = lagged_reference(model, ids, ids, states, passes, grad_passes)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(after, expected_states, rtol=1e-10, atol=1e-10)
    assert not after.requires_grad
    before = states if passes == 1 else lagged_reference(model, ids, ids, states, passes - 1, 1)[1].detach()
    assert residual.item() == pytest.approx(((after - before).norm() / after.norm()).item(), rel=1e-5)
    for ours, theirs in zip(gradients(model, loss), gradients(model, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["dproj", "context_pythia"])
def test_layers_that_have_no_part_in_the_states_read_the_last_pass_alone(name):
    model = lively(create_model(name, **SHAPE | {"num_layers": 3})).double()
    ids, read = torch.randint(60, (2, 9)), []
    expected = lagged_reference(model, ids, ids, model.no_states(ids), 5, 3)[0]
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: read.append(1))
    loss, _, _ = lagged_loss(model, ids, ids, start(model, ids), 4, 3)
    assert len(read) == 3
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(gradients(model, loss), gradients(model, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@settings(max_examples=20)
@given(share=st.floats(0.02, 0.9))
def test_deep_steps_are_a_share_of_all_and_spread_over_the_run(share):
    assert not any(is_deep(step, 0.0) for step in range(50))
    deep = [step for step in range(1000) if is_deep(step, share)]
    assert len(deep) == pytest.approx(1000 * share, abs=5)
    assert max(b - a for a, b in pairwise([*deep, 1000])) < 3 / share


@pytest.mark.parametrize("shares", [[0.3], [0.1], [0.2, 0.5]])
def test_text_and_tasks_have_the_same_share_of_deep_steps(shares):
    tasks = list(itertools.islice(task_of_each_step(shares), 1000))
    for task in (None, *range(len(shares))):
        own = [is_deep(step, 0.1) for step in range(1000) if tasks[step] == task]
        assert sum(own) == pytest.approx(0.1 * len(own), abs=5)


# The store


@STORES
def test_what_is_written_is_read_by_sample(memory, tmp_path):
    cache = lagged_cache(5, 3, 2, tmp_path, memory)
    assert isinstance(cache, MappedLaggedCache) == (memory < 1)
    states = torch.randn(3, 3, 2)
    cache.write(torch.tensor([4, -1, 1]), states)
    assert cache.knows(torch.tensor([0, 1, 4, -1])).tolist() == [False, True, True, False]
    assert torch.equal(cache.read(torch.tensor([1, 4])), states[[2, 0]].bfloat16())
    cache.write(torch.tensor([1, 1]), states[:2])  # a batch may reach from one pass into the next
    assert torch.equal(cache.read(torch.tensor([1])), states[1:2].bfloat16())


@STORES
@settings(max_examples=10)
@given(data=st.data())
def test_a_store_goes_back_to_its_newest_checkpoint_from_anywhere(memory, data, tmp_path_factory):
    """Kills are what a new object in the place of the old one sees: the file and the checkpoints, nothing else."""
    folder = tmp_path_factory.mktemp("run")
    cache, at_checkpoint, newest, count = lagged_cache(4, 3, 2, folder, memory), None, None, 0
    for event in data.draw(st.lists(st.sampled_from(["write", "save", "kill", "torn"]), max_size=25)):
        if event == "write":
            samples = torch.tensor(data.draw(st.lists(st.integers(-1, 3), min_size=1, max_size=3)))
            cache.write(samples, torch.randn(len(samples), 3, 2))
        elif event == "save":
            count += 1
            (checkpoint := folder / f"checkpoint-{count}").mkdir()
            cache.save(checkpoint)
            if not data.draw(st.booleans(), label="killed right here"):
                cache.saved(checkpoint)
            newest, at_checkpoint = checkpoint, (cache.rows.clone(), cache.known.clone())
            if cache.checkpoint != checkpoint:
                event = "kill"
        if event in ("kill", "torn"):
            if event == "torn" and newest is not None and memory < 1:
                with (newest / UNDO_LOG).open("ab") as log:
                    log.write(b"half a row")
            cache = lagged_cache(4, 3, 2, folder, memory)
            if newest is not None:
                cache.restore(newest)
                rows, known = at_checkpoint
                assert torch.equal(cache.known, known)
                assert torch.equal(cache.rows[known], rows[known])


# Runs


@pytest.fixture(autouse=True)
def _toy_preset(monkeypatch):
    monkeypatch.setitem(PLUGIN_PRESETS, "toy", TOY)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return excerpt(tmp_path_factory.mktemp("text"), 12_000)


def tiny(text, **changes):
    shape = {"hidden_size": 16, "intermediate_size": 32, "seq_length": 16}
    values = {"max_tokens": None, "epochs": 1, "samples": 150, "eval_tokens": 200, "checkpoint_minutes": 0}
    return tiny_runs.tiny(text, **{"model": "toy"} | shape | values | changes)


def outcome(folder):
    """What a run leaves that does not depend on the clock."""
    lines = metrics(folder)
    for line in lines:
        line.pop("seconds")
    return lines, (folder / "model" / "model.safetensors").read_bytes()


def interrupt_at(step, send=signal.raise_signal):
    def on_progress(progress):
        if progress.step == step:
            send(signal.SIGINT)

    return on_progress


def kill_at(settings, folder, step):
    def child():
        run(settings, folder, interrupt_at(step, lambda _: os.kill(os.getpid(), signal.SIGKILL)))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def test_the_steps_of_a_run_are_the_method(text, tmp_path):
    """At a learning rate of nothing, each window's loss is that of its own iterations: 1 in the first pass over the
    text, 2 in the second."""
    changes = {"samples": 8, "epochs": 3, "evaluations": 1, "lr": 1e-12, "checkpoint_minutes": 60}
    settings = tiny(text, **changes)
    data = prepare(settings)
    train(settings, data, tmp_path / "run")
    torch.manual_seed(settings.seed)
    model = new_model(settings, data)
    windows = WindowDataset(data.splits["train"], 16, 8, settings.seed)
    ids = torch.stack([windows[i]["input_ids"] for i in range(8)])
    losses = [line["train_loss"] for line in metrics(tmp_path / "run") if "train_loss" in line]
    residuals = [line["residual"] for line in metrics(tmp_path / "run") if "train_loss" in line]
    for epoch in range(3):  # two steps of four windows in each
        loss, _, _ = lagged_loss(model, ids, ids, start(model, ids), epoch + 1, 1)
        assert sum(losses[2 * epoch : 2 * epoch + 2]) / 2 == pytest.approx(loss.item(), abs=2e-4)
    assert residuals[0] > residuals[2] > residuals[4] > 0


def test_the_validation_loss_is_that_of_true_recurrence(text, tmp_path):
    settings = tiny(text, samples=40)
    result = run(settings, tmp_path / "run")
    model, tokens = load_model(tmp_path / "run"), prepare(settings).splits["validation"]
    assert isinstance(model, RecurrentLM)
    assert token_weighted_loss(model, tokens, settings) == result.best_val_loss
    ids = torch.from_numpy(tokens.ids[:16].astype("int64"))[None]
    with torch.no_grad():
        cache = model.make_cache()
        steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(15)]
        expected = torch.nn.functional.cross_entropy(torch.cat(steps, 1)[0], ids[0, 1:], reduction="none")
        torch.testing.assert_close(model.token_losses(ids)[0], expected, rtol=1e-4, atol=1e-5)


def test_accumulated_micro_batches_train_like_one_batch(text, tmp_path):
    deep = {"lagged_passes": 2, "lagged_deep_share": 0.3, "lagged_deep_passes": 3, "evaluations": 1}
    deep |= {"samples": 24, "epochs": 2, "checkpoint_minutes": 60}
    run(tiny(text, batch_size=4, **deep), tmp_path / "whole")
    run(tiny(text, batch_size=1, gradient_accumulation=4, **deep), tmp_path / "parts")
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        assert a.get("train_loss", 0) == pytest.approx(b.get("train_loss", 0), rel=1e-3)
        assert a.get("grad_norm", 0) == pytest.approx(b.get("grad_norm", 0), rel=1e-2)


@STORES
def test_a_run_that_is_interrupted_and_killed_ends_as_any_other(memory, text, tmp_path):
    options = {"lagged_memory": memory, "lagged_passes": 2, "lagged_grad_passes": 2, "lagged_deep_share": 0.25}
    settings = tiny(text, samples=24, epochs=3, gradient_accumulation=2, precision="bf16", batch_size=2, **options)
    settings.checkpoint_minutes = 60  # so that much is overwritten after the last checkpoint
    whole = run(settings, tmp_path / "whole")
    assert whole.steps == 18
    kill_at(settings, tmp_path / "parts", 10)  # in the midst of a pass over the windows
    if memory < 1:
        assert (tmp_path / "parts" / "checkpoint-6" / UNDO_LOG).stat().st_size > 0
    assert (tmp_path / "parts" / "checkpoint-6" / STATES).is_file()
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "parts", interrupt_at(14))
    run(settings, tmp_path / "parts")
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
    left = [path.name for path in (tmp_path / "parts").rglob("*") if "lagged" in path.name]
    assert left == []


def test_both_stores_train_the_same(text, tmp_path):
    for name, memory in (("memory", 1.0), ("file", 1e-9)):
        seen = []

        def watch(progress, name=name, seen=seen):
            seen.append((tmp_path / name / FILE).exists())

        run(tiny(text, samples=24, epochs=2, lagged_memory=memory, checkpoint_minutes=60), tmp_path / name, watch)
        assert all(seen) == any(seen) == (name == "file")
    assert outcome(tmp_path / "memory") == outcome(tmp_path / "file")


def test_step_by_step_is_another_training(text, tmp_path):
    for step_by_step in (False, True):
        folder = tmp_path / str(step_by_step)
        run(tiny(text, samples=24, step_by_step=step_by_step, checkpoint_minutes=60), folder)
        assert any("residual" in line for line in metrics(folder)) != step_by_step
    assert outcome(tmp_path / "False")[1] != outcome(tmp_path / "True")[1]


class Windows(torch.utils.data.Dataset):
    """Two windows of text, and after them those of a task: three short ones each in the place of one."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(60, (12,) if index < 2 else (3, 4), generator=generator)
        return {"input_ids": ids, "labels": ids}


def test_windows_of_a_task_begin_with_a_discrete_pass_every_time(tmp_path):
    model, windows = lively(toy()), KeyedWindows(Windows())
    training = LaggedTraining(model, RunSettings(seq_length=12), len(windows), tmp_path)
    text, task = stack_windows([windows[1], windows[0]]), stack_windows([windows[2], windows[5]])
    assert text["sample"].tolist() == [1, 0]
    assert task["sample"].tolist() == [-1] * 6
    first, second = (training.loss(text, 0, None).item() for _ in range(2))
    assert first != second
    ids = task["input_ids"]
    expected, _, _ = lagged_loss(model, ids, ids, start(model, ids), 1, 1)
    for _ in range(2):
        assert training.loss(task, 0, None).item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_batch_may_hold_known_and_unknown_windows(tmp_path):
    model, windows = lively(toy()), KeyedWindows(Windows())
    training = LaggedTraining(model, RunSettings(seq_length=12), len(windows), tmp_path)
    training.loss(stack_windows([windows[0]]), 0, None)
    batch = stack_windows([windows[0], windows[1]])
    states = start(model, batch["input_ids"])
    states[0] = training.cache.read(torch.tensor([0]))
    expected, _, _ = lagged_loss(model, batch["input_ids"], batch["labels"], states, 1, 1)
    assert training.loss(batch, 0, None).item() == pytest.approx(expected.item(), rel=1e-6)


def test_states_that_grow_without_bound_are_told_apart_from_a_learning_rate_that_is_too_high(text):
    settings = tiny(text)
    flow = FlowCallback(settings, Schedule.of(10, settings), "float32", phase="")
    control = TrainerControl()
    history = [{"loss": 5.0, "residual": 0.5}, {"eval_loss": float("inf")}]
    with pytest.raises(UserError, match=r"by true recurrence the states grow .* --lagged-passes 2"):
        flow.on_log(None, TrainerState(log_history=history, global_step=3), control)
    history = [{"loss": float("nan"), "residual": 0.5}]
    with pytest.raises(UserError, match="try a lower --lr"):
        flow.on_log(None, TrainerState(log_history=history, global_step=3), control)


def test_what_cannot_be_trained_this_way_is_refused(text, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--streaming: toy feeds a state back .* --step-by-step true"):
        run(tiny(text, streaming=True), tmp_path / "run")
    with pytest.raises(UserError, match=r"--lagged-grad-passes is 3: .* --lagged-passes 2"):
        run(tiny(text, lagged_passes=2, lagged_grad_passes=3), tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        run(tiny(text), tmp_path / "run")
    assert not (tmp_path / "run").exists()
