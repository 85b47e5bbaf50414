"""Training: exact to resume, by play, on steps of the optimizer, weight decay on matrices alone."""

import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from vintix_stub import write_dataset

from newllm import devices
from newllm.errors import UserError
from newllm.vintix import train as module
from newllm.vintix.data import HistoryDataset
from newllm.vintix.environments import TaskFamily, from_spec
from newllm.vintix.model import VintixModel
from newllm.vintix.settings import VintixRun
from newllm.vintix.train import train
from newllm.vintix.trainer import VintixTrainer, training_arguments

SMALL = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16, "context": 24}
SMALL |= {"steps": 8, "batch_size": 2, "gradient_accumulation": 2, "evaluations": 4, "validation_episodes": 2}


class Killed(BaseException):
    """As if the process had been killed: nothing is saved."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("vintix") / "histories")


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_the_learning_rate_follows_the_optimizers_steps_not_the_micro_batches(data, tmp_path):
    """Of which there are two in each of the 8 steps: one of warm-up, then half a cosine, to 0 at the last."""
    train(VintixRun(**SMALL, lr=1e-2), [data], tmp_path / "run")
    rates = [line["learning_rate"] for line in metrics(tmp_path / "run") if "learning_rate" in line]
    assert rates == pytest.approx([1e-2 * (1 + math.cos(math.pi * step / 7)) / 2 for step in range(8)])


def test_a_killed_and_continued_run_equals_an_uninterrupted_one(data, tmp_path):
    run = VintixRun(**SMALL, dropout=0.2, lr=1e-2, seed=3)
    whole = train(run, [data], tmp_path / "whole")
    seen = []

    def kill_at_6(progress):
        seen.append(progress.step)
        if progress.step == 6:
            raise Killed

    with pytest.raises(Killed):
        train(run, [data], tmp_path / "killed", kill_at_6)
    assert seen == [2, 4, 6]
    continued = train(run, [data], tmp_path / "killed", lambda progress: seen.append(progress.step))
    assert seen == [2, 4, 6, 6, 8]
    assert (continued.best_score, continued.best_step) == (whole.best_score, whole.best_step)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_finished_run_is_kept_and_other_settings_move_it_aside(data, tmp_path):
    run = VintixRun(**SMALL | {"steps": 2, "evaluations": 1})
    result = train(run, [data], tmp_path / "run")
    again = train(run, [data], tmp_path / "run", lambda progress: pytest.fail("trained again"))
    assert again == result
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    train(VintixRun(**SMALL | {"steps": 2, "evaluations": 1, "lr": 1e-3}), [data], tmp_path / "run")
    assert (tmp_path / "run~old" / "model").is_dir()


def test_what_cannot_be_trained_or_played_leaves_a_finished_run_where_it_is(data, tmp_path, monkeypatch):
    run = VintixRun(**SMALL | {"steps": 1, "evaluations": 1})
    train(run, [data], tmp_path / "run")
    before = metrics(tmp_path / "run")
    with pytest.raises(UserError, match="--context is 99"):
        train(dataclasses.replace(run, context=99), [data], tmp_path / "run")
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(UserError, match="needs gymnasium"):
        train(dataclasses.replace(run, lr=1e-3), [data], tmp_path / "run")
    assert [path.name for path in tmp_path.glob("run*") if path.is_dir()] == ["run"]
    assert metrics(tmp_path / "run") == before


@pytest.mark.parametrize("native", [True, False])
def test_the_precision_that_auto_is_here_is_kept(data, tmp_path, monkeypatch, native):
    monkeypatch.setattr(devices, "native_bf16", lambda device: native)
    train(VintixRun(**SMALL | {"steps": 1, "evaluations": 1}), [data], tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["precision"] == ("bf16" if native else "float32")


def test_the_weights_that_play_best_are_kept(data, tmp_path, monkeypatch):
    scores, played = iter([0.1, 0.7, 0.3, 0.5]), []

    def score(model, *_):
        played.append({name: value.clone() for name, value in model.state_dict().items()})
        return next(scores)

    monkeypatch.setattr(module, "in_context_score", score)
    result = train(VintixRun(**SMALL), [data], tmp_path / "run")
    assert (result.best_score, result.best_step) == (0.7, 4)
    kept = VintixModel.from_pretrained(tmp_path / "run" / "model").state_dict()
    assert all(torch.equal(kept[name], played[1][name]) for name in kept)


def test_training_plays_validation_tasks_and_never_a_test_task(data, tmp_path, monkeypatch):
    made = []

    def make(family, task_ids, seed):
        made.append((family.task_ids("validation").tolist(), family.task_ids("test").tolist(), task_ids.tolist()))
        return original(family, task_ids, seed)

    original = TaskFamily.make
    monkeypatch.setattr(TaskFamily, "make", make)
    train(VintixRun(**SMALL | {"target": "demonstrator"}), [data], tmp_path / "run")
    (_, _, checked), *evaluated = made
    assert checked == [0], "a step in the first training task, by which the metadata are checked"
    assert len(evaluated) == SMALL["evaluations"]
    for validation, test, played in evaluated:
        assert played == validation
        assert not set(played) & set(test)


def test_a_warm_up_is_a_share_of_the_steps_and_decay_spares_vectors(data, tmp_path):
    run = VintixRun(**SMALL | {"steps": 200}, warmup_ratio=0.05, lr=1.0, weight_decay=0.3)
    model = module.new_model(run, [module.read_histories(data)])
    trainer = VintixTrainer(run, lambda model: 0.0, None, tmp_path, model=model)
    trainer.create_optimizer_and_scheduler(run.steps)
    for group in trainer.optimizer.param_groups:
        assert {parameter.ndim >= 2 for parameter in group["params"]} == {group["weight_decay"] > 0}
    rates = []
    for _ in range(run.steps):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates.index(max(rates)) in (9, 10)
    assert max(rates) == pytest.approx(1.0, abs=0.02)
    assert rates[-1] < 0.01
    assert training_arguments(run, tmp_path).max_steps == 200


def test_training_fits_the_demonstrator(data, tmp_path):
    """Noise-free histories leave no noise as the floor of the loss."""
    histories = write_dataset(tmp_path / "demonstrator", train_tasks=12, noise_free=True)
    run = VintixRun(**SMALL | {"steps": 120, "evaluations": 1, "batch_size": 4}, lr=1e-2, start_share=0.0)
    train(run, [histories], tmp_path / "run")
    losses = [line["train_loss"] for line in metrics(tmp_path / "run") if "train_loss" in line]
    assert losses[-1] < 0.5 * losses[0]


def test_the_target_is_what_was_done_or_what_the_demonstrator_would_have_done(data, tmp_path):
    random, played = (
        module.read_histories(path) for path in (data, write_dataset(tmp_path / "demonstrator", noise_free=True))
    )
    family = from_spec(random.metadata["family"])
    assert np.allclose(module.demonstrated(played, family), played.action, atol=1e-4)
    random.target = module.demonstrated(random, family)
    assert not np.allclose(random.target, random.action, atol=0.1)
    window = HistoryDataset([random], 24, seed=0, start_share=1.0)[0]
    row = int(np.flatnonzero([np.array_equal(window["action"], target[:24]) for target in random.target])[0])
    assert np.array_equal(window["previous_action"][1:], random.action[row, :23])
    train(VintixRun(**SMALL | {"steps": 2, "evaluations": 1, "target": "demonstrator"}), [data], tmp_path / "run")


def test_two_families_train_together(data, tmp_path):
    other = write_dataset(tmp_path / "other", train_tasks=3)
    run = VintixRun(**SMALL | {"steps": 2, "evaluations": 1})
    train(run, [data, other], tmp_path / "run")
    model = VintixModel.from_pretrained(tmp_path / "run" / "model")
    assert len(model.encoders) == len(model.heads) == len(model.config.groups) == 2


def test_other_files_and_a_loss_that_is_not_finite_are_refused(data, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="other files"):
        train(VintixRun(**SMALL), [data], tmp_path / "mine")
    with pytest.raises(UserError, match="training loss"):
        train(VintixRun(**SMALL, lr=1e30, max_grad_norm=0.0), [data], tmp_path / "run")


def test_a_score_that_is_not_finite_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "in_context_score", lambda *given: float("nan"))
    with pytest.raises(UserError, match="seed-0: the in-context score is nan at step 2"):
        train(VintixRun(**SMALL), [data], tmp_path / "run")
