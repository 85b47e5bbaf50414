"""Gates learn at a rate of their own, without weight decay; a model without gates trains as it always has."""

import itertools
import signal

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import STEP, tiny

from newllm.data import prepare
from newllm.models.layers import PythiaLayer
from newllm.training import new_model, train, trainer
from newllm.training.callbacks import Schedule


@pytest.fixture
def gated(monkeypatch):
    """Layers whose attention's norm has its bias trained as a gate."""
    monkeypatch.setattr(PythiaLayer, "gate_parameters", lambda layer: [layer.norm_attention.bias])


def trainer_of(settings, tmp_path):
    data = prepare(settings)
    model = new_model(settings, data)
    return trainer.LMTrainer(
        settings=settings,
        schedule=Schedule.of(20, settings),
        validation=data.splits["validation"],
        tokens_per_step=STEP,
        phase="",
        model=model,
        args=trainer.training_arguments(settings, tmp_path, steps=20),
        train_dataset=[],
    )


def names(trainer):
    """The names of the parameters of each group of the optimizer."""
    name_of = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    return [[name_of[id(parameter)] for parameter in group["params"]] for group in trainer.optimizer.param_groups]


def test_without_gates_there_are_the_two_groups_of_always(text, tmp_path):
    subject = trainer_of(tiny(text), tmp_path)
    subject.create_optimizer()
    assert [group["weight_decay"] for group in subject.optimizer.param_groups] == [0.1, 0.0]
    assert sorted(itertools.chain(*names(subject))) == sorted(name for name, _ in subject.model.named_parameters())


def test_gates_have_a_group_of_their_own(text, tmp_path, gated):
    subject = trainer_of(tiny(text, gate_lr=0.02), tmp_path)
    subject.create_optimizer()
    gates = subject.optimizer.param_groups[-1]
    assert (gates["lr"], gates["weight_decay"]) == (0.02, 0.0)
    matrices, vectors, own = names(subject)
    assert own == ["layers.0.norm_attention.bias", "layers.1.norm_attention.bias"]
    assert sorted(matrices + vectors + own) == sorted(name for name, _ in subject.model.named_parameters())


def test_frozen_gates_are_in_no_group(text, tmp_path, gated):
    subject = trainer_of(tiny(text), tmp_path)
    subject.model.requires_grad_(False)
    subject.model.head.weight.requires_grad_(True)
    subject.create_optimizer()
    assert names(subject) == [["head.weight"], []]


def test_the_rate_of_gates_follows_the_schedule_and_the_log_tells_the_models(text, tmp_path, gated, monkeypatch):
    logged = []

    class Watched(trainer.LMTrainer):
        def log(self, logs, start_time=None):
            if "learning_rate" in logs:
                logged.append((logs["learning_rate"], *self.lr_scheduler.get_last_lr()))
            super().log(logs, start_time)

    monkeypatch.setattr("newllm.training.run.LMTrainer", Watched)
    settings = tiny(text, lr=0.001, gate_lr=0.05, warmup_ratio=0.25)
    train(settings, prepare(settings), tmp_path / "run")
    assert len(logged) == 20
    for before, after in itertools.pairwise(logged):
        assert after[0] == before[1] == before[2]  # the log tells the rate of the step that was taken
        assert before[3] == pytest.approx(50 * before[1])


def test_a_larger_rate_moves_gates_and_gates_alone_at_once(text, tmp_path, gated):
    moved = {}
    for rate in (0.001, 0.1):
        settings = tiny(text, gate_lr=rate, max_tokens=STEP, evaluations=1)
        train(settings, prepare(settings), tmp_path / str(rate))
        moved[rate] = load_file(tmp_path / str(rate) / "model" / "model.safetensors")
    for name, slow in moved[0.001].items():
        fast = moved[0.1][name]
        if name.endswith("norm_attention.bias"):
            assert fast.abs().mean() > 50 * slow.abs().mean() > 0
        else:
            assert torch.equal(fast, slow), name


def test_an_interrupted_run_with_gates_continues_exactly(text, tmp_path, gated):
    def interrupt(progress):
        if progress.step == 7:
            signal.raise_signal(signal.SIGINT)

    settings = tiny(text)
    train(settings, prepare(settings), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(settings, prepare(settings), tmp_path / "parts", interrupt)
    train(settings, prepare(settings), tmp_path / "parts")
    whole, parts = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
