"""Diverse projection: the cell and its loss against formulas worked out by hand, and the model around it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from newllm.errors import UserError
from newllm.evaluation import cache_bytes
from newllm.models import create_model, load_model
from newllm.models.projection import DiverseProjection, DProjConfig, effective_rank, oacd_loss
from newllm.models.recurrent import lag

SHAPE = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 80, "vocab_size": 61}


def make(**options):
    model = create_model("dproj", **SHAPE, **options).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_oacd_loss_and_its_gradient_equal_a_case_worked_out_by_hand():
    """Mean (2, 1), deviations (±1, ∓1): ‖P − mean‖_F = 2, ‖mean‖² = 5."""
    projections = torch.tensor([[3.0, 0.0], [1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    loss = oacd_loss(projections, mean_weight=0.1)
    assert loss.item() == pytest.approx(-2 / 2 + 0.1 * 5, abs=1e-15)
    (gradient,) = torch.autograd.grad(loss, projections)
    # −(P − mean) / (‖P − mean‖_F · N) + 2 · 0.1 · mean / N
    expected = [[-1 / 4 + 0.2, 1 / 4 + 0.1], [1 / 4 + 0.2, -1 / 4 + 0.1]]
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)


def test_among_vectors_of_one_length_oacd_falls_with_the_mean_alone():
    spread, narrow = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert oacd_loss(spread, 0.1) == pytest.approx(-math.sqrt(2) / 2)
    assert oacd_loss(narrow, 0.1) == pytest.approx(-1 / 2 + 0.1 / 2)
    assert effective_rank(spread) < effective_rank(narrow)  # what it does not ask for


@given(rank=st.integers(1, 6), scale=st.floats(1e-3, 1e3))
def test_effective_rank_counts_directions_that_are_used_alike(rank, scale):
    directions = torch.linalg.qr(torch.randn(40, 6, dtype=torch.float64))[0][:, :rank] * scale
    assert effective_rank(directions @ torch.eye(rank, 6, dtype=torch.float64)) == pytest.approx(rank, rel=1e-6)


def test_effective_rank_of_unequal_directions():
    """Shares ¾ and ¼ of the singular values."""
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(expected)


def test_the_cell_is_its_formula():
    torch.manual_seed(3)
    cell = DiverseProjection(5, 3).double()
    before, e = torch.randn(3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    weight = torch.cat([cell.recurrent, cell.inputs], dim=1)  # W of [p; e]
    x = weight @ torch.cat([before, e]) + cell.bias
    moved = before + x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    expected = (moved - moved.mean()) / torch.sqrt(moved.var(correction=0) + 1e-5)
    torch.testing.assert_close(cell(before, cell.drive(e)), expected, rtol=1e-12, atol=1e-12)


def test_initial_values_of_the_cell_are_its_own():
    model = create_model("dproj", **SHAPE | {"hidden_size": 256})
    assert model.cell.recurrent.std().item() == pytest.approx(0.1, rel=0.02)
    assert model.cell.inputs.std().item() == pytest.approx(0.1, rel=0.02)
    assert model.cell.bias.std().item() == pytest.approx(0.01, rel=0.2)
    assert model.layers[0].qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_the_loop_over_the_cell_is_the_general_recurrence_in_outputs_and_gradients():
    model = make()
    ids = torch.randint(61, (2, 9))
    positions = torch.arange(9).expand(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :3] = False
    weight = torch.randn(2, 9, 40, dtype=torch.float64) * mask[..., None]
    for seen in (None, mask):
        ours = model.recur(ids, positions=positions, mask=seen, cache=model.make_cache())
        general = super(type(model), model).recur(ids, positions=positions, mask=seen, cache=model.make_cache())
        real = torch.ones_like(mask) if seen is None else seen
        torch.testing.assert_close(ours[real], general[real], rtol=1e-10, atol=1e-10)
        wanted = [*model.cell.parameters(), model.embed.weight, model.layers[0].qkv.weight]
        for a, b in zip(
            torch.autograd.grad((ours * weight).sum(), wanted),
            torch.autograd.grad((general * weight).sum(), wanted),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_parallel_passes_reach_true_recurrence_one_token_at_a_time():
    model = make()
    ids = torch.randint(61, (2, 7))
    positions = torch.arange(7).expand(2, 7)
    truth, _ = model.project(ids)
    states = model.first_states(ids, positions)
    torch.testing.assert_close(states, super(type(model), model).first_states(ids, positions), rtol=0, atol=0)
    for done in range(1, 8):
        torch.testing.assert_close(states[:, :done], truth[:, :done], rtol=1e-10, atol=1e-10)
        hidden, states = model.iterate(ids, lag(states), positions=positions)
    torch.testing.assert_close(hidden, model.hidden_states(ids), rtol=1e-10, atol=1e-10)


def test_measured_cache_bytes_are_five_eighths_of_the_baselines():
    tokens = 24
    ids = torch.randint(61, (1, tokens))
    used = {}
    for name in ("pythia", "dproj"):
        model = create_model(name, **SHAPE).eval()
        cache = model.make_cache()
        with torch.no_grad():
            model(ids, past_key_values=cache)
        used[name] = cache_bytes(cache).used
    fed_back = 40 * 4
    assert used["dproj"] - fed_back == 0.625 * used["pythia"]


def test_its_layers_and_its_head_have_the_projections_width(tmp_path):
    model = create_model("dproj", **SHAPE)
    assert model.embed.weight.shape == (61, 64)
    assert model.head.weight.shape == (61, 40)
    assert model.layers[1].qkv.weight.shape == (120, 40)
    assert (model.config.hidden_size, model.config.embedding_size, model.state_size) == (40, 64, 40)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path).config
    for name in DProjConfig.option_names():
        assert getattr(loaded, name) == getattr(model.config, name), name


@pytest.mark.parametrize(("hidden_size", "share"), [(512, 0.625), (640, 0.5), (320, 1.0)])
def test_a_model_of_the_default_width_is_loaded_as_what_it_was(tmp_path, hidden_size, share):
    """What equals a default value need not stand in config.json."""
    model = create_model("dproj", **SHAPE | {"hidden_size": hidden_size}, projection_size=share)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path).config
    assert (loaded.embedding_size, loaded.hidden_size, loaded.projection_size) == (hidden_size, 320, 320)


@pytest.mark.parametrize(("size", "width"), [(0.5, 32), (24, 24), (1.0, 64)])
def test_a_width_is_a_share_or_a_number(size, width):
    assert create_model("dproj", **SHAPE, projection_size=size).config.hidden_size == width


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projection_size": 30}, "projection_size is 30: it must be a multiple of num_heads 4, for example 40"),
        ({"projection_size": "half"}, "projection_size is 'half': it must be a multiple of num_heads 4"),
        ({"embedding_size": 7, "projection_size": 0.5}, r"embedding_size is 7: .* set projection_size alone"),
        ({"embedding_size": "wide", "projection_size": 64}, r"embedding_size is 'wide': .* set projection_size alone"),
        ({"embedding_size": 7}, r"embedding_size is 7: .* leave it out"),
        ({"cell": "randon"}, "unknown cell 'randon' of model 'dproj': did you mean 'random'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: .* differ in width"),
    ],
)
def test_wrong_options_are_told(options, message):
    with pytest.raises(UserError, match=message):
        create_model("dproj", **SHAPE, **options)


def test_a_configuration_without_layers_can_be_made():
    """Hugging Face does, to see which values are not the default ones."""
    assert DProjConfig().hidden_size == 320
