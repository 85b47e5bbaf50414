"""What a model that feeds a state back is worth after some passes, and by true recurrence."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy_recurrent import lively, toy

from newllm.evaluation import perplexity as pp
from newllm.evaluation.recurrence import PASSES, Iterations, recurrence_figures
from newllm.models import create_model
from newllm.models.recurrent import lag
from newllm.settings import RunSettings


def settings(**values):
    defaults = {"seq_length": 7, "eval_batch_size": 3, "precision": "float32", "position_window": 7}
    return RunSettings(**defaults | values)


def tokens(count):
    return SimpleNamespace(ids=np.random.default_rng(0).integers(60, size=count).astype(np.uint32))


def test_figures_are_those_of_the_passes_they_name():
    model, held_out = lively(toy()).double().eval(), tokens(6 * 8)  # 8 whole windows
    figures = recurrence_figures(model, held_out, settings())
    assert [row["passes"] for row in figures["passes"]] == list(PASSES)
    ids = torch.from_numpy(held_out.ids.astype(np.int64))
    before_first = torch.cat([ids[-1:], ids])  # the first token is predicted too, from the last one
    windows = torch.stack([before_first[start : start + 7] for start in range(0, 48, 6)])
    positions = torch.arange(7).expand_as(windows)
    with torch.no_grad():
        states = model.first_states(windows, positions)
        for number in range(1, 9):
            before = states
            hidden, states = model.iterate(windows, lag(before), positions=positions)
            if number in PASSES:
                row = figures["passes"][PASSES.index(number)]
                ppl = pp.perplexity(float(model.losses_of(hidden, windows).mean()))
                assert row["ppl"] == pytest.approx(ppl, rel=1e-6)
                moved = float((states - before).norm() / states.norm())
                assert row["residual"] == pytest.approx(moved, rel=1e-6, abs=1e-12)
    truth = pp.token_weighted_loss(model, held_out, settings())
    assert figures["ppl"] == math.exp(truth)
    assert figures["passes"][-1]["ppl"] == pytest.approx(figures["ppl"], rel=1e-6), (
        "windows of 7: 8 passes are the truth"
    )
    assert figures["passes"][0]["ppl"] != pytest.approx(figures["ppl"], rel=1e-3)
    assert figures["passes"][-1]["residual"] < 1e-6 < figures["passes"][1]["residual"]


@torch.no_grad()
def test_residuals_are_over_all_batches():
    model = lively(toy()).double().eval()
    ids = torch.randint(60, (4, 9))
    whole, parts = Iterations(model), Iterations(model)
    whole.token_losses(ids)
    for part in ids.split(1):
        parts.token_losses(part)
    for passes in PASSES:
        assert whole.residual(passes) == pytest.approx(parts.residual(passes), rel=1e-6, abs=1e-9)


def test_a_model_without_a_state_has_no_such_figures():
    shape = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32, "vocab_size": 60}
    for name in ("pythia", "discrete"):
        assert recurrence_figures(create_model(name, **shape), tokens(50), settings()) is None


def test_larger_batches_for_a_loop_over_time_change_no_loss(monkeypatch):
    model, held_out = toy().eval(), tokens(300)
    losses, rows = [], []
    read = model.token_losses

    def watched(input_ids):
        rows.append(len(input_ids))
        return read(input_ids)

    monkeypatch.setattr(model, "token_losses", watched)
    for factor in (1, pp.RECURRENT_ROWS):
        monkeypatch.setattr(pp, "RECURRENT_ROWS", factor)
        losses.append(pp.token_weighted_loss(model, held_out, settings()))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert sorted(set(rows))[-2:] == [3, 24]
