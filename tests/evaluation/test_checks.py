"""The checks as trained: at the shortest windows a setting allows, and of a model that fails in long ones alone."""

import math

import pytest
import torch

from newllm.evaluation.checks import CHECK_SHAPE, check_as_trained, is_causal
from newllm.evaluation.contract import CHECKS, Subject
from newllm.models import create_model


@pytest.mark.parametrize("tokens", [2, 3, 4])
def test_a_sound_model_passes_at_windows_of_two_and_three_tokens(tokens):
    results = check_as_trained(create_model("pythia", **CHECK_SHAPE), tokens, "float32")
    assert [(result.name, result.passed) for result in results] == [
        ("finite, as trained", True),
        ("future, as trained", True),
        ("rows, as trained", True),
    ]


def test_a_model_that_is_finite_only_in_short_windows_is_not_called_a_leak():
    """NaN differs from itself, as the logits of a leak differ from those before."""
    model = create_model("pythia", **CHECK_SHAPE)
    model.head.register_forward_hook(
        lambda head, inputs, logits: logits.masked_fill(torch.arange(logits.shape[1])[:, None] >= 8, math.nan)
    )
    assert is_causal(check_as_trained(model, 8, "float32"))
    finite, future, _ = results = check_as_trained(model, 16, "float32")
    assert (finite.passed, finite.detail) == (False, "logits are not finite from token 8 on")
    assert future.passed is None
    assert not is_causal(results)


def test_a_row_that_ends_with_eos_is_not_blamed_for_the_padding_behind_it():
    model = create_model("pythia", **CHECK_SHAPE).double().eval()
    subject = Subject(model, torch.randint(CHECK_SHAPE["vocab_size"], (3, 24)), tolerance=1e-10)
    check, _ = CHECKS["generate"]
    with torch.no_grad():
        first, other = model(subject.ids[:2, :12]).logits[:, -1].argmax(dim=1).tolist()
        assert first != other, "the first row alone is to end"
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = first
        passed, detail = check(subject)
        assert passed, detail
