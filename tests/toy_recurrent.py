"""A small recurrent model for the tests of what holds for all of them, and all that the package has."""

import torch
from torch import nn

from newllm.models import meta_model, preset_names
from newllm.models.config import LMConfig
from newllm.models.recurrent import RecurrentLM
from newllm.models.transformer import register_architecture

SHAPE = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32, "vocab_size": 60}
TOY = {"about": "for tests", "architecture": "toy", "layers": [{"type": "pythia"}]}  # as a preset


class ToyConfig(LMConfig):
    model_type = "newllm-toy"


@register_architecture("toy")
class ToyLM(RecurrentLM):
    """What the last layer makes of a token is read beside the next one."""

    config_class = ToyConfig

    def __init__(self, config=None, **options):
        super().__init__(config, **options)
        self.feed = nn.Linear(self.config.hidden_size, self.config.hidden_size)

    @property
    def state_size(self):
        return self.config.hidden_size

    def iterate(self, input_ids, lagged, *, positions, mask=None, cache=None):
        x = self.embed(input_ids) + self.feed(lagged).tanh()
        for layer, state in zip(self.layers, cache.layers if cache else [None] * len(self.layers), strict=False):
            x = layer(x, positions=positions, mask=mask, state=state)
        return self.norm(x), x


def toy(**options):
    spec = {"type": "pythia"} | {key: SHAPE[key] for key in ("hidden_size", "num_heads", "intermediate_size")}
    return ToyLM(ToyConfig(hidden_size=16, vocab_size=60, layer_specs=[spec] * 2, **options))


def lively(model):
    """With weights so large that states matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
    return model


def recurrent_presets():
    """Those whose model feeds a state back."""
    models = {name: meta_model(name, **SHAPE | {"num_layers": 6}) for name in preset_names()}
    return [name for name, model in models.items() if isinstance(model, RecurrentLM) and model.state_size]
