"""In what mode a model is read when something is measured of it."""

import pytest
import torch

from newllm.evaluation.reading import as_measured
from newllm.models import create_model

SHAPE = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 24, "vocab_size": 40}


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_left_in_the_mode_it_was_in_also_after_an_exception(training):
    model = create_model("pythia", **SHAPE).train(training)
    seen = []

    def read_and_fail():
        with as_measured(model, "bf16"):
            seen.extend((model.training, torch.is_grad_enabled(), model(torch.zeros(1, 3, dtype=int)).logits.dtype))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_and_fail()
    assert seen == [False, False, torch.bfloat16]
    assert all(module.training is training for module in model.modules())
    assert torch.is_grad_enabled()
