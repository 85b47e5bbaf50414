"""RecurrentLM: true recurrence, and its iterations, on a toy and on every preset that feeds a state back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy_recurrent import SHAPE, ToyLM, lively, recurrent_presets, toy

from newllm.errors import UserError
from newllm.evaluation.checks import check_model
from newllm.evaluation.contract import CHECKS
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


@pytest.mark.parametrize("name", [*MODELS, "context_plain:gates=update,num_contexts=2,conv_size=3"])
@settings(max_examples=5)
@given(real=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=9), split=st.integers(1, 8))
@torch.no_grad()
def test_padding_anywhere_changes_nothing_for_real_tokens(name, real, split):
    """At once, in two chunks, and in as many parallel passes as tokens."""
    real[len(real) // 2] = (True, True)  # no row without a token
    model, mask = make(name), torch.tensor(real).T
    ids = torch.randint(60, mask.shape)
    forms = {
        "whole": model.hidden_states(ids, attention_mask=mask),
        "parallel": iterated(model, ids, len(real), mask)[0],
    }
    cache, stop = model.make_cache(), min(split, len(real) - 1)
    forms["chunks"] = torch.cat(
        [
            model.hidden_states(ids[:, :stop], attention_mask=mask[:, :stop], past_key_values=cache),
            model.hidden_states(ids[:, stop:], attention_mask=mask, past_key_values=cache),
        ],
        dim=1,
    )
    for row, own in enumerate(mask):
        alone = model.hidden_states(ids[row : row + 1, own])[0]
        for hidden in forms.values():
            torch.testing.assert_close(hidden[row, own], alone, **TIGHT)


class Written(TorchDispatchMode):
    """Counts the numbers in all results."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        self.numbers += sum(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        return result


@pytest.mark.parametrize("name", ["dproj", "context_plain", "context_pythia", "context_vector"])
def test_the_gradient_of_a_cells_loop_costs_a_token_no_more_in_a_long_text(name):
    """A token cut out by its index has for gradient a whole text of zeros."""
    model, numbers = make(name).train(), []
    for length in (32, 128):
        ids = torch.randint(60, (1, length))
        loss = model(ids, labels=ids).loss
        with Written() as written:
            loss.backward()
        numbers.append(written.numbers / length)
    assert numbers[1] < 1.05 * numbers[0]


def test_embeddings_in_place_of_tokens_are_refused_by_a_line():
    with pytest.raises(UserError, match=r"reads input_ids.* give no inputs_embeds"):
        toy()(inputs_embeds=torch.zeros(1, 3, 16))


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
