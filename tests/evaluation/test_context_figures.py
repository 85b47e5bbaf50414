"""How long contexts keep what they hold, against gates set by hand."""

import math

import numpy as np
import pytest
import torch

from newllm import create_model
from newllm.data import TokenFile
from newllm.evaluation.checks import CHECK_SHAPE
from newllm.evaluation.contexts import Fading, context_figures
from newllm.resolution import resolve
from newllm.settings import RunSettings

SETTINGS = resolve(RunSettings(seq_length=24, eval_batch_size=3, precision="float32", device="cpu"))
TOKENS = TokenFile(np.random.default_rng(0).integers(61, size=500), np.array([0, 200, 500]), 1, ["a", "b"])


@pytest.mark.parametrize("name", ["pythia", "context_vector", "context_plain"])
def test_models_whose_contexts_never_fade_have_no_figures(name):
    assert context_figures(create_model(name, **CHECK_SHAPE), TOKENS, SETTINGS) is None


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("context", [0, 1]),
        ("context:gates=update", [0, 1]),
        ("context:gates=update_forget", [0, 1]),
        ("context:gates=none", [0, 1]),
        ("context_hybrid", [0]),
        ("context_pythia:time_scales.long=30", [None]),
    ],
)
def test_gates_that_see_nothing_have_the_time_scales_of_their_rates(name, layers):
    model = create_model(name, **CHECK_SHAPE)
    for cell_name, parameter in model.named_parameters():
        if cell_name.endswith(("cell.project.weight", "cell.project.bias", "cell.recur.weight")):
            parameter.data.zero_()
        if cell_name.endswith("cell.rates"):  # 1 − a = 1/3, and of one number 1/40
            parameter.data.fill_(-math.log(2)).index_fill_(0, torch.tensor([len(parameter) - 1]), -math.log(39))
    figures = context_figures(model.eval(), TOKENS, SETTINGS)
    assert [entry["layer"] for entry in figures["layers"]] == layers
    for entry in figures["layers"]:
        assert entry["median"] == pytest.approx(-1 / math.log(2 / 3), rel=1e-5)
        assert entry["largest"] == pytest.approx(-1 / math.log(39 / 40), rel=1e-4)


def test_the_mean_is_over_tokens_and_gates_are_left_as_they_were():
    """A gate open at every second token fades to 1/e in twice the time, and the hooks are gone afterwards."""
    model = create_model("context:time_scales=null,conv_size=1", **CHECK_SHAPE | {"num_layers": 1}).eval()
    cell = model.layers[0].cell
    cell.project.weight.data.zero_()
    cell.project.bias.data.zero_()
    cell.rates.data.zero_()
    calls = []

    def every_second(module, inputs, retained):
        calls.append(retained.shape)
        closed = torch.arange(retained.shape[1]) % 2 == 1
        return torch.where(closed[:, None, None], torch.ones_like(retained), retained)

    handle = cell.retained.register_forward_hook(every_second)
    figures = context_figures(model, TOKENS, SETTINGS)
    windows = sum(shape[0] * shape[1] for shape in calls)
    open_tokens = sum(shape[0] * ((shape[1] + 1) // 2) for shape in calls)
    assert figures["layers"][0]["median"] == pytest.approx(windows / open_tokens / math.log(2), rel=1e-5)
    handle.remove()
    assert not cell.retained._forward_hooks


def test_what_never_fades_is_the_slowest_and_not_the_fastest():
    fading = Fading()
    fading.add(torch.nn.Identity(), (), torch.tensor([1.0, 0.5, 1.0]).expand(2, 4, 1, 3))
    scales = fading.time_scales()
    assert scales.max() == scales.median() == math.inf
    assert scales[0, 1] == pytest.approx(1 / math.log(2))
