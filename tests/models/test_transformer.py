"""The model around the layers: what the contract over all layer types does not ask."""

import pytest
import torch

from newllm.evaluation.checks import CHECK_SHAPE
from newllm.models import create_model


@pytest.mark.parametrize("name", ["pythia", "mla", "infini"])
def test_torch_compile_reads_a_model_as_it_is(name):
    """With rotary positions, whose table is kept between layers where nothing is compiled."""
    model, ids = create_model(name, **CHECK_SHAPE).double().eval(), torch.randint(61, (2, 12))
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")(ids).logits
        torch.testing.assert_close(compiled, model(ids).logits, rtol=1e-10, atol=1e-10)
