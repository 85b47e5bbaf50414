"""A training run from the outside: its folder, its figures, its budget, and what it does when something goes wrong."""

import errno
import math
import os
import shutil
import signal
from functools import partial

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file
from tiny_runs import STEP, metrics, run

from newllm.data import prepare
from newllm.errors import UserError
from newllm.evaluation.perplexity import token_weighted_loss
from newllm.models import load_model
from newllm.training import exact, new_model, train, trainer
from newllm.training.checkpoints import checkpoints, newest_checkpoint

tiny = partial(tiny_runs.tiny, evaluations=4, max_tokens=40 * STEP)


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_folder_holds_all_there_is_to_know(text, tmp_path):
    settings = tiny(text)
    seen = []
    result = run(settings, tmp_path / "run", seen.append)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "config.yaml", "metrics.jsonl", "model", "result.json",
    ]  # fmt: skip
    lines = metrics(tmp_path / "run")
    validation = [line["val_loss"] for line in lines if "val_loss" in line]
    assert len(validation) == 4
    assert result.best_val_loss == min(validation) < validation[0] < math.log(300)
    assert lines[-1]["tokens"] == result.tokens == result.steps * STEP == settings.max_tokens
    assert not result.stopped_early
    assert seen[-1].step == seen[-1].total_steps == 40
    assert seen[-1].val_loss is None or seen[-1].val_loss == validation[-2]
    assert train(settings, prepare(settings), tmp_path / "run") == result  # a second call trains nothing


def test_the_kept_model_has_the_reported_validation_loss(text, tmp_path):
    settings = tiny(text, precision="bf16", lr=0.03, evaluations=8)
    result = run(settings, tmp_path / "run")
    data = prepare(settings)
    assert (
        token_weighted_loss(load_model(tmp_path / "run"), data.splits["validation"], settings) == result.best_val_loss
    )


def test_the_same_seed_gives_the_same_weights_and_another_does_not(text, tmp_path):
    first, second, other = (tiny(text, max_tokens=5 * STEP, seed=seed) for seed in (0, 0, 1))
    for name, settings in (("a", first), ("b", second), ("c", other)):
        run(settings, tmp_path / name)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_accumulated_micro_batches_train_like_one_batch(text, tmp_path):
    """The loss must be averaged over the whole step, neither summed over its parts nor divided twice."""
    run(tiny(text, batch_size=4), tmp_path / "whole")
    run(tiny(text, batch_size=1, gradient_accumulation=4), tmp_path / "parts")
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        assert a.get("train_loss", 0) == pytest.approx(b.get("train_loss", 0), rel=1e-3)
        assert a.get("grad_norm", 0) == pytest.approx(b.get("grad_norm", 0), rel=1e-2)


def test_learning_rate_warms_up_and_ends_at_its_share(text, tmp_path):
    run(tiny(text, warmup_ratio=0.25, min_lr_ratio=0.1), tmp_path / "run")
    rates = [line["learning_rate"] for line in metrics(tmp_path / "run") if "train_loss" in line]
    assert 0 < rates[0] < rates[5] < rates[9] == pytest.approx(0.003)
    assert rates[-1] == pytest.approx(0.0003)


def test_patience_stops_early_and_the_best_weights_are_kept(text, tmp_path):
    settings = tiny(text, samples=8, epochs=200, max_tokens=None, lr=0.01, patience=2)  # overfits soon
    result = run(settings, tmp_path / "run")
    validation = [line["val_loss"] for line in metrics(tmp_path / "run") if "val_loss" in line]
    assert result.stopped_early
    assert result.steps < 400
    assert validation.index(min(validation)) == len(validation) - 3
    assert result.best_val_loss == min(validation)
    data = prepare(settings)
    assert (
        token_weighted_loss(load_model(tmp_path / "run"), data.splits["validation"], settings) == result.best_val_loss
    )


def test_weight_decay_spares_vectors(text):
    settings = tiny(text)
    model = new_model(settings, prepare(settings))
    decayed = trainer.LMTrainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    assert "embed.weight" in decayed
    assert not [name for name in decayed if name.endswith("bias") or "norm" in name]
    assert {name for name, p in model.named_parameters() if p.ndim == 2} == set(decayed)


def test_a_loss_that_is_not_finite_is_one_line(text, tmp_path):
    with pytest.raises(UserError, match=r"loss is (nan|inf) at step \d+ \(lr 1e\+30, float32\)"):
        run(tiny(text, lr=1e30, warmup_ratio=0, max_grad_norm=0), tmp_path / "run")


def interrupt_at(step):
    def on_progress(progress):
        if progress.step == step:
            signal.raise_signal(signal.SIGINT)

    return on_progress


def test_an_interrupt_saves_and_the_same_call_continues_exactly(text, tmp_path):
    settings = tiny(text)
    expected = run(settings, tmp_path / "whole")
    for step in (13, 29):
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path / "parts", interrupt_at(step))
        assert not (tmp_path / "parts" / "model").exists()
    result = run(settings, tmp_path / "parts")
    assert (result.best_val_loss, result.steps) == (expected.best_val_loss, expected.steps)
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    steps = [line["step"] for line in metrics(tmp_path / "parts") if "train_loss" in line]
    assert steps == sorted(set(steps))


def halve(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    return content


def test_a_damaged_checkpoint_is_passed_over(text, tmp_path, capsys):
    settings, folder = tiny(text), tmp_path / "parts"
    run(settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(settings, folder, interrupt_at(13))
    older, newest = checkpoints(folder)
    for name in ("model.safetensors", "trainer_state.json", "rng_state.pth", "scheduler.pt", "sizes.json"):
        content = halve(newest / name)
        assert newest_checkpoint(folder) == older
        (newest / name).write_bytes(content)
    halve(newest / "optimizer.pt")
    capsys.readouterr()
    run(settings, folder)
    assert f"{newest / 'optimizer.pt'} is damaged: going on from {older.name}\n" in capsys.readouterr().err
    assert same(weights(folder), weights(tmp_path / "whole"))


def test_checkpoints_that_are_all_damaged_are_one_line(text, tmp_path):
    settings, folder = tiny(text), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(settings, folder, interrupt_at(3))
    (only,) = checkpoints(folder)
    (only / "optimizer.pt").unlink()
    with pytest.raises(UserError, match=rf"optimizer.pt is damaged, and no older .*: remove {only} to train anew"):
        run(settings, folder)


def test_no_process_goes_on_before_all_have_read_the_best_weights(text, tmp_path, monkeypatch):
    """The first one then removes the checkpoints."""
    done, load = [], exact.load_weights
    monkeypatch.setattr(exact, "load_weights", lambda *args: done.append("read") or load(*args))
    monkeypatch.setattr(exact, "wait", lambda: done.append("wait"))
    run(tiny(text, max_tokens=2 * STEP), tmp_path / "run")
    assert done[-2:] == ["read", "wait"]


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: shutil.rmtree(file.parent), halve])
def test_best_weights_that_are_gone_are_one_line(text, tmp_path, monkeypatch, damage):
    settings, folder = tiny(text), tmp_path / "run"
    monkeypatch.setattr(trainer.LMTrainer, "measure", lambda self: {"eval_loss": float(self.state.global_step)})
    with pytest.raises(KeyboardInterrupt):
        run(settings, folder, interrupt_at(13))
    best, _ = checkpoints(folder)
    damage(best / "model.safetensors")
    with pytest.raises(UserError, match=rf"the best weights of this run: remove {folder} to train anew"):
        run(settings, folder)


@pytest.mark.parametrize("content", ['{"hash": "a", ', "[]", ""])
def test_a_damaged_result_is_one_line(text, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text(content)
    with pytest.raises(UserError, match=r"result.json is damaged .*: move .*run away"):
        run(tiny(text), tmp_path / "run")


def test_a_full_disk_is_one_line_and_the_run_continues_exactly(text, tmp_path, monkeypatch):
    settings = tiny(text)
    run(settings, tmp_path / "whole")
    saved = []

    def save_or_fail(model, path):
        saved.append(path)
        if len(saved) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save_weights(model, path)

    save_weights = exact.save_weights
    with monkeypatch.context() as patch:
        patch.setattr(exact, "save_weights", save_or_fail)
        with pytest.raises(UserError, match="no space left"):
            run(settings, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").glob("checkpoint*")] == ["checkpoint-20"]
    run(settings, tmp_path / "run")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
