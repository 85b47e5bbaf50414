"""The checks as trained, at the shortest windows a setting allows."""

import pytest

from newllm.evaluation.checks import CHECK_SHAPE, check_as_trained
from newllm.models import create_model


@pytest.mark.parametrize("tokens", [2, 3, 4])
def test_a_sound_model_passes_at_windows_of_two_and_three_tokens(tokens):
    results = check_as_trained(create_model("pythia", **CHECK_SHAPE), tokens, "float32")
    assert [(result.name, result.passed) for result in results] == [
        ("future, as trained", True),
        ("rows, as trained", True),
    ]
