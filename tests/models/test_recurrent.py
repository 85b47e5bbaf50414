"""RecurrentLM: true recurrence, and its iterations, on a toy and on every preset that feeds a state back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_recurrent import SHAPE, ToyLM, lively, recurrent_presets, toy

from newllm.evaluation.checks import CHECKS, check_model
from newllm.models import create_model, load_model
from newllm.models.recurrent import lag

MODELS = ["toy", *recurrent_presets()]
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def make(name, dtype=torch.float64):
    model = toy() if name == "toy" else create_model(name, **SHAPE | {"num_layers": 3})
    # Without layers nothing is normalised, and with large weights rounding grows from token to token.
    return (lively(model) if model.layers else model).to(dtype).eval()


def places(ids, mask=None):
    if mask is None:
        return torch.arange(ids.shape[1]).expand(ids.shape)
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def iterated(model, ids, passes, mask=None):
    """Hidden states after so many passes, and the states."""
    positions = places(ids, mask)
    states = model.first_states(ids, positions, mask)
    for _ in range(passes):
        hidden, states = model.iterate(ids, lag(states, mask), positions=positions, mask=mask)
    return hidden, states


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@torch.no_grad()
def test_as_many_passes_as_tokens_are_the_true_recurrence(name, dtype, tolerance):
    model = make(name, dtype)
    ids = torch.randint(60, (3, 12))
    truth = model.hidden_states(ids)
    scale = truth.abs().max()
    hidden, _ = iterated(model, ids, 12)
    torch.testing.assert_close(hidden / scale, truth / scale, rtol=0, atol=tolerance)
    if name == "toy":  # whatever the states to begin with
        states = torch.randn(3, 12, model.state_size, dtype=dtype)
        for _ in range(12):
            hidden, states = model.iterate(ids, lag(states), positions=places(ids))
        torch.testing.assert_close(hidden / scale, truth / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_pass_makes_one_more_token_exact(name):
    model = make(name)
    ids = torch.randint(60, (2, 7))
    truth = model.hidden_states(ids)
    for passes in range(1, 7):
        torch.testing.assert_close(iterated(model, ids, passes)[0][:, :passes], truth[:, :passes], **TIGHT)


@settings(max_examples=10)
@given(pads=st.lists(st.integers(0, 5), min_size=2, max_size=2), length=st.integers(1, 8))
@torch.no_grad()
def test_left_padding_changes_nothing_for_real_tokens(pads, length):
    model = make("toy")
    width = length + max(pads)
    ids, mask = torch.randint(60, (2, width)), torch.arange(width) >= torch.tensor(pads)[:, None]
    padded = model.hidden_states(ids, attention_mask=mask)
    iterations = iterated(model, ids, width, mask)[0]
    for row, pad in enumerate(pads):
        alone = model.hidden_states(ids[row : row + 1, pad:])[0]
        torch.testing.assert_close(padded[row, pad:], alone, **TIGHT)
        torch.testing.assert_close(iterations[row, pad:], alone, **TIGHT)


@settings(max_examples=5)
@given(split=st.integers(1, 8))
@torch.no_grad()
def test_the_cache_carries_the_state_from_chunk_to_chunk(split):
    model = make("toy")
    ids = torch.randint(60, (2, 9))
    cache = model.make_cache()
    parts = [model.hidden_states(part, past_key_values=cache) for part in (ids[:, :split], ids[:, split:])]
    torch.testing.assert_close(torch.cat(parts, dim=1), model.hidden_states(ids), **TIGHT)
    assert cache.layers[-1].seen == 9
    assert cache.layers[-1].read("state").shape == (2, 16)


@torch.no_grad()
def test_rows_that_are_reset_begin_anew():
    model = make("toy")
    first, second = torch.randint(60, (2, 2, 5))
    cache = model.make_cache()
    model.hidden_states(first, past_key_values=cache)
    cache.reset_rows(torch.tensor([True, False]))
    positions = torch.stack([torch.arange(5), torch.arange(5, 10)])
    hidden = model.hidden_states(second, past_key_values=cache, position_ids=positions)
    torch.testing.assert_close(hidden[0], model.hidden_states(second)[0], **TIGHT)
    torch.testing.assert_close(hidden[1], model.hidden_states(torch.cat([first, second], 1))[1, 5:], **TIGHT)


def test_the_whole_contract_holds():
    results = check_model(toy().double().eval(), tokens=24)  # at larger weights, a chaos that magnifies rounding
    assert [result.name for result in results] == list(CHECKS)
    assert [result for result in results if result.passed is not True] == []


def test_a_saved_model_is_loaded_as_what_it_was(tmp_path):
    model = make("toy", torch.float32)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path).eval()
    ids = torch.randint(60, (2, 9))
    assert isinstance(loaded, ToyLM)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


class DiscreteToy(ToyLM):
    state_size = 0

    def iterate(self, input_ids, lagged, **inputs):
        assert lagged.shape[-1] == 0
        zeros = lagged.new_zeros(*input_ids.shape, 16)
        return super().iterate(input_ids, zeros, **inputs)[0], lagged


@torch.no_grad()
def test_without_a_state_one_pass_is_all(monkeypatch):
    model = DiscreteToy(toy().config).double().eval()
    ids = torch.randint(60, (2, 9))
    monkeypatch.setattr(model, "recur", None)
    whole, cache = model.hidden_states(ids), model.make_cache()
    parts = [model.hidden_states(ids[:, t : t + 1], past_key_values=cache) for t in range(9)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **TIGHT)
    assert len(cache.layers) == 2
