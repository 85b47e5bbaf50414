"""What closing gates costs, against models whose gates are closed by hand."""

import math

import numpy as np
import pytest
import torch

from newllm import create_model
from newllm.data import TokenFile
from newllm.evaluation.checks import CHECK_SHAPE
from newllm.evaluation.memories import memory_figures
from newllm.evaluation.perplexity import token_weighted_loss
from newllm.resolution import resolve
from newllm.settings import RunSettings

SETTINGS = resolve(RunSettings(seq_length=24, eval_batch_size=3, precision="float32", device="cpu"))
TOKENS = TokenFile(np.random.default_rng(0).integers(61, size=500), np.array([0, 200, 500]), 1, ["a", "b"])


def make(name):
    model = create_model(name, **CHECK_SHAPE, segment_length=5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def test_models_without_memories_have_no_figures():
    assert memory_figures(create_model("pythia", **CHECK_SHAPE), TOKENS, SETTINGS) is None
    assert memory_figures(create_model("segment_local", **CHECK_SHAPE), TOKENS, SETTINGS) is None


@pytest.mark.parametrize("name", ["infini", "multi_memory", "hierarchical", "infini_adapter"])
def test_closing_gates_costs_what_a_model_with_closed_gates_loses_and_changes_nothing(name):
    model = make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    figures = memory_figures(model, TOKENS, SETTINGS)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert figures["ppl"] == pytest.approx(math.exp(token_weighted_loss(model, TOKENS, SETTINGS)))
    assert figures["layers"][0]["gates"] == model.layers[0].gates().tolist()
    assert (figures["fine_closed_ppl"] is None) == (name != "hierarchical")
    if name == "hierarchical":
        assert 0 < figures["layers"][0]["fine_open"] < 1
        assert figures["fine_closed_ppl"] != figures["ppl"]
        model.layers[0].fine_gate.weight.data.zero_()
        model.layers[0].fine_gate.bias.data.fill_(-1000)
        closed = memory_figures(model, TOKENS, SETTINGS)
        assert closed["layers"][0]["fine_open"] == 0
        assert closed["ppl"] == pytest.approx(figures["fine_closed_ppl"])
        model.load_state_dict(before)
    model.layers[0].beta.data.fill_(0 if name == "infini_adapter" else -1000)
    assert figures["closed_ppl"] != figures["ppl"]
    assert figures["closed_ppl"] == pytest.approx(math.exp(token_weighted_loss(model, TOKENS, SETTINGS)))
