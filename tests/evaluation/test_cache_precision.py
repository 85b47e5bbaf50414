"""Perplexity through quantised caches: the same text, the same model, another cache."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from newllm.evaluation.cache_precision import cache_cost, compare_precisions
from newllm.evaluation.perplexity import evaluate, token_weighted_loss
from newllm.models import TransformerLM, create_model
from newllm.models.cache import PRECISIONS, RecurrentState
from newllm.models.layers import Layer, MemoryAdapterLayer, PythiaLayer
from newllm.settings import RunSettings

SHAPE = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "vocab_size": 50}
SETTINGS = RunSettings(
    **{"seq_length": 16, "position_window": 24, "sliding_window": 24, "sliding_stride": 8, "eval_batch_size": 4},
    decode_context=32,
    precision="float32",
)


def text(length):
    ids = np.random.default_rng(0).integers(0, 50, length).astype(np.uint32)
    return SimpleNamespace(ids=ids, document_starts=np.array([0, length // 3, length]), num_bytes=3 * length)


def model_of(name, **options):
    model = create_model(name, **SHAPE, **options)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(5)  # attention that tells its keys apart
    return model


@pytest.mark.parametrize("name", ["pythia", "mla"])
def test_precisions_are_measured_on_the_same_text(name):
    model, tokens = model_of(name), text(130)
    rows = compare_precisions(model, {"test": tokens}, SETTINGS, ["model", "int8", "int4"])
    losses = [row["test"]["loss"] for row in rows]
    plain = evaluate(model, tokens, SETTINGS)
    assert {key: rows[0]["test"][key] for key in plain} == plain  # a cache that is not quantised changes nothing
    assert 0 < abs(losses[1] - losses[0]) < abs(losses[2] - losses[0]) < 0.5
    assert [row["test"]["delta_loss"] for row in rows] == [loss - losses[0] for loss in losses]
    assert len({row["test"]["sliding_ppl"] for row in rows}) == 3
    numbers = 128 if name == "mla" else 2 * 64
    assert [row["dtype"] for row in rows] == ["float32", "int8", "uint8"]
    assert [row["cache_bytes_per_token"] for row in rows] == [2 * numbers * b for b in (4, 1 + 2 / 32, 0.5 + 2 / 32)]
    assert [row["state_bytes"] for row in rows] == [0, 0, 0]


def test_the_loss_of_a_model_whose_configuration_quantises_its_cache_is_taken_through_it():
    plain, tokens = model_of("pythia"), text(60)
    own = model_of("pythia", cache_precision="int4")
    own.load_state_dict(plain.state_dict())
    through = compare_precisions(plain, {"test": tokens}, SETTINGS, ["int4"])[0]["test"]["loss"]
    assert token_weighted_loss(own, tokens, SETTINGS) == through != token_weighted_loss(plain, tokens, SETTINGS)


def test_a_window_that_is_full_grows_no_more():
    row = compare_precisions(model_of("pythia", window=9), {"test": text(60)}, SETTINGS, ["int8"])[0]
    assert (row["cache_bytes_per_token"], row["state_bytes"]) == (0, 8 * 2 * 2 * 2 * 34)


class Halves(Layer):
    """Remembers the last token, as float16; or nothing at all."""

    def __init__(self, hidden_size, remembers=True):
        super().__init__()
        self.remembers, self.linear = remembers, torch.nn.Linear(hidden_size, hidden_size)

    def forward(self, x, *, positions, mask, state):
        if state is not None and self.remembers:
            state.write(x.shape[1], last=x[:, -1].half())
        return x + self.linear(x)

    def make_state(self):
        return RecurrentState()


@pytest.mark.parametrize(
    ("layers", "dtypes"),
    [
        (lambda: [Halves(64), PythiaLayer(64, 2, 64)], ["float32", "int8", "uint8"]),
        (lambda: [Halves(64, False), PythiaLayer(64, 2, 64)], ["float32", "int8", "uint8"]),
        (lambda: [MemoryAdapterLayer(64, 2, 64)], ["float32", "int8", "uint8"]),
        (lambda: [Halves(64, False), Halves(64)], ["float16"] * 3),
        (lambda: [Halves(64, False)], ["float32"] * 3),
    ],
)
def test_the_dtype_of_a_mixed_cache_is_that_of_what_grows(layers, dtypes):
    model = TransformerLM(layers=layers(), vocab_size=50)
    for precision, dtype in zip(PRECISIONS, dtypes, strict=True):
        assert cache_cost(model, text(60), SETTINGS, precision)["dtype"] == dtype


def test_the_dtype_of_a_cache_that_does_not_grow_is_no_counters():
    assert cache_cost(model_of("infini_all"), text(60), SETTINGS, "model")["dtype"] == "float32"
