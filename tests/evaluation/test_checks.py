"""The checks as trained: at the shortest windows a setting allows, and of a model that fails in long ones alone."""

import math

import pytest
import torch

from newllm.evaluation.checks import CHECK_SHAPE, check_as_trained, is_causal
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
