"""Continuous LM: what is fed back, what the model then still sees of the text, and several passes through its layers.

That cache, padding, rows and generation keep the contract is tested for every preset in test_layer_contract.py.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from newllm.errors import UserError
from newllm.evaluation.checks import CHECK_SHAPE, check_model
from newllm.models import ContinuousLM, create_model, load_model
from newllm.models.layers import InfiniLayer, MLALayer, PythiaLayer, create_layer
from newllm.models.recurrent import lag
from newllm.training.lagged_cache import lagged_loss

SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48, "vocab_size": 61}
RECURRENT = ("continuous", "continuous_extra", "continuous_combined", "continuous_fuse")


def make(name, **options):
    model = create_model(name, **SHAPE, **options).double().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def normalise(h):
    return (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()


def layers(model, x):
    positions = torch.arange(x.shape[1]).expand(x.shape[:2])
    for layer in model.layers:
        x = layer.reference(x, positions=positions, mask=None)
    return x


def naive(model, ids):
    """h (B, T, D) by the formulas of SYSTEMS §8, token by token, everything before it computed again; no cache."""
    config, embeddings, inputs, states = model.config, model.embed(ids), [], []
    for t in range(ids.shape[1]):
        x = embeddings[:, t]
        if config.mode == "continuous" and t:
            h = states[-1]
            if config.feedback != "state":
                probabilities = model.head(model.norm(h)).softmax(-1)
                if config.feedback == "word":
                    probabilities = F.one_hot(probabilities.argmax(-1), probabilities.shape[-1]).double()
                h = probabilities @ model.embed.weight
            h = normalise(h)
            back = h @ model.proj.weight.T
            if config.input == "fuse":
                both = torch.cat([normalise(x), h], dim=-1)
                back = x + torch.sigmoid(both @ model.gate.weight.T + model.gate.bias) * back
            x = back
        inputs.append(x)
        first = last = layers(model, torch.stack(inputs, dim=1))
        for _ in range(config.extra_passes):
            again = normalise(last) @ model.extra_proj.weight.T
            last = layers(model, last + again if config.pass_residual else again)
        if config.use_h1:
            last = torch.cat([first, last], dim=-1) @ model.combine.weight.T
        states.append(last[:, -1])
    return torch.stack(states, dim=1)


@pytest.mark.parametrize(
    "name",
    [
        *RECURRENT,
        "continuous_fuse:position=none",
        "continuous_fuse:feedback=distribution",
        "continuous_fuse:feedback=word",
        "continuous:feedback=distribution",
        "continuous_combined:extra_passes=2",
        "discrete_extra_3",
        "discrete_extra_3:pass_residual=true",
    ],
)
def test_forward_is_the_true_recurrence_of_the_formulas(name):
    model, ids = make(name), torch.randint(61, (2, 7))
    expected = model.head(model.norm(naive(model, ids)))
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "name", [*RECURRENT, *(f"continuous_fuse:feedback={kind}" for kind in ("distribution", "word"))]
)
def test_as_many_passes_as_tokens_are_the_true_recurrence_gradients_included(name):
    model, ids = make(name).train(), torch.randint(61, (2, 6))
    true = model(ids, labels=ids).loss
    positions = torch.arange(6).expand(2, 6)
    states = model.no_states(ids)
    for _ in range(6):
        hidden, states = model.iterate(ids, lag(states), positions=positions)
    loss = model.loss_of(hidden, ids)
    torch.testing.assert_close(loss, true, rtol=1e-10, atol=1e-10)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(loss, parameters, materialize_grads=True)
    theirs = torch.autograd.grad(true, parameters, materialize_grads=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["distribution", "word"])
def test_what_is_left_of_a_state_keeps_the_contract_of_all_models(kind):
    checks = check_model(create_model(f"continuous_fuse:feedback={kind}", **CHECK_SHAPE), tokens=24)
    assert {check.name: check.detail for check in checks if check.passed is False} == {}
    assert {"future", "rows", "padding", "chunks", "generate"} <= {check.name for check in checks if check.passed}


def test_discrete_is_pythia_by_another_name():
    pythia, discrete = make("pythia"), make("discrete")
    discrete.load_state_dict(pythia.state_dict())  # strict: no weight more or less
    ids = torch.randint(61, (2, 9))
    assert torch.equal(discrete(ids).logits, pythia(ids).logits)
    assert discrete.state_size == 0


@pytest.mark.parametrize("name", ["continuous", "continuous_fuse"])
def test_a_discrete_pass_is_that_of_an_ordinary_model(name):
    model, pythia, ids = make(name), make("pythia"), torch.randint(61, (2, 9))
    pythia.load_state_dict(model.state_dict(), strict=False)
    states = model.first_states(ids, torch.arange(9).expand(2, 9))
    torch.testing.assert_close(model.head(model.norm(states)), pythia(ids).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", RECURRENT)
def test_what_true_recurrence_sees_of_the_text(name):
    """In place of tokens, states of states: only the first token is ever read. Fused, every token is."""
    model, ids = make(name), torch.randint(1, 61, (1, 8))
    before = model(ids).logits[:, -1]
    for t in range(8):
        changed = ids.clone()
        changed[:, t] = 0
        same = torch.equal(model(changed).logits[:, -1], before)
        assert same == (model.config.input == "replace" and t > 0)


def test_k_passes_hide_the_last_k_tokens():
    """In place of tokens: after k passes from a discrete one, token t + 1 is predicted from tokens ≤ t − k."""
    model, ids = make("continuous"), torch.randint(1, 61, (1, 8))
    for k in (1, 2, 3):
        states = model.compute_loss(ids, ids, passes=k)[1]["states"][:, -1]
        for t in range(8):
            changed = ids.clone()
            changed[:, t] = 0
            moved = not torch.equal(model.compute_loss(changed, ids, passes=k)[1]["states"][:, -1], states)
            assert moved == (t <= 7 - k)


@pytest.mark.parametrize("mode", ["discrete", "continuous"])
@pytest.mark.parametrize(("extra_pass", "use_h1"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("input", ["replace", "fuse"])
def test_one_model_can_be_asked_in_every_mode(mode, extra_pass, use_h1, input):
    model, ids = make("continuous", input=input), torch.randint(61, (2, 6))
    loss, stats = model.compute_loss(ids, ids, mode=mode, extra_pass=extra_pass, use_h1=use_h1, passes=6)
    options = {"mode": mode} | ({"input": input} if mode == "continuous" else {})
    same = create_model("discrete", **SHAPE, **options, extra_passes=int(extra_pass), use_h1=use_h1)
    same = same.double().eval()
    same.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(loss, same.token_losses(ids).mean(), rtol=1e-10, atol=1e-10)
    assert stats["ppl"] == pytest.approx(math.exp(loss.item()))
    assert stats["tokens"] == 10
    assert stats["passes"] == (6 if mode == "continuous" else 1)
    assert stats["residual"] == pytest.approx(0, abs=1e-6)
    loss.backward()
    used = {"extra_proj": extra_pass, "combine": use_h1, "proj": mode == "continuous"}
    for part, wanted in used.items():
        assert (getattr(model, part).weight.grad is not None) == wanted


def test_a_loss_beyond_all_perplexities_is_an_infinite_one_and_no_error():
    model, ids = make("continuous_fuse"), torch.randint(61, (2, 6))
    with torch.no_grad():
        model.head.weight.mul_(1e5)
    loss, stats = model.compute_loss(ids, ids)
    assert stats["loss"] == loss.item() > 710
    assert stats["ppl"] == math.inf


def test_the_loss_goes_on_from_given_states():
    model, ids = make("continuous_fuse"), torch.randint(61, (2, 9))
    loss, stats = model.compute_loss(ids, ids, passes=3)
    states = None
    for _ in range(3):
        again, more = model.compute_loss(ids, ids, states=states)
        states = more["states"]
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=1e-12)
    assert more["residual"] == pytest.approx(stats["residual"])
    assert more["residual"] < model.compute_loss(ids, ids)[1]["residual"]


def test_layers_of_any_kind_and_a_quantised_cache_read_alike_at_any_split():
    shape = (32, 4, 48)
    mixed = [MLALayer(*shape, kv_dim=16), InfiniLayer(*shape, segment_length=4), PythiaLayer(*shape, window=3)]
    for precision in ("model", "int8"):
        model = ContinuousLM(layers=mixed, vocab_size=61, input="fuse", extra_passes=1, cache_precision=precision)
        model, ids = model.double().eval(), torch.randint(61, (2, 11))
        cache = model.make_cache()
        with torch.no_grad():
            parts = [model(part, past_key_values=cache).logits for part in ids.split([3, 1, 7], dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, rtol=1e-9, atol=1e-9)
        assert len(cache.layers) == 2 * 3 + 1


def test_beam_search_equals_beam_search_without_cache():
    model, prompt = make("continuous_fuse", extra_passes=1), torch.randint(61, (2, 4))
    beam = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(model.generate(prompt, **beam), model.generate(prompt, **beam, use_cache=False))


def test_what_is_fed_back_begins_at_the_scale_of_an_embedding():
    model = create_model("continuous_fuse", **SHAPE | {"hidden_size": 256})
    h = torch.randn(100, 256) * 7 + 3
    for projection in (model.proj, model.extra_proj):
        assert projection(h).std().item() == pytest.approx(0.02, rel=0.1)
        assert not projection(torch.zeros(3, 256)).any()


def test_the_gate_begins_where_it_is_told_and_a_loaded_one_where_it_was(tmp_path):
    for bias in (0, -3):
        model = create_model(f"continuous_fuse:gate_bias={bias}", **SHAPE)
        assert (model.gate.bias == bias).all()
        assert not any(layer.mlp.up.bias.any() for layer in model.layers)
    torch.nn.init.constant_(model.gate.bias, 1.5)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert (loaded.gate.bias == 1.5).all()
    assert loaded.config.gate_bias == -3


def test_in_place_of_words_the_first_one_of_a_window_is_the_only_one_that_learns():
    """The discrete pass, which alone reads the others, is one without gradient (docs/continuous.md)."""
    ids = torch.arange(12).view(2, 6)
    for name, learning in (("continuous", {0, 6}), ("continuous_fuse", set(range(12)))):
        model = make(name)
        with torch.no_grad():
            states = model.first_states(ids, torch.arange(6).expand(2, 6))
        lagged_loss(model, ids, ids, states, passes=2, grad_passes=2)[0].backward()
        learnt = model.embed.weight.grad.any(dim=1).nonzero()[:, 0].tolist()
        assert set(learnt) <= learning
        assert set(learnt) >= learning - {5, 11}  # nothing is predicted from the last one


def test_under_autocast_the_residual_stream_is_float32_and_every_used_weight_learns():
    model, ids = create_model("continuous_fuse", **SHAPE, extra_passes=1, use_h1=True), torch.randint(61, (2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        loss, stats = model.compute_loss(ids, ids, passes=2)
        loss.backward()
        true = model.eval().token_losses(ids).mean()
    assert stats["states"].dtype == torch.float32
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert true == pytest.approx(float(model.token_losses(ids).mean()), rel=1e-2)


def test_a_saved_model_comes_back_as_what_it_was(tmp_path):
    model, ids = make("continuous_combined:input=fuse"), torch.randint(61, (2, 5))
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype=torch.float64).eval()
    assert isinstance(loaded, ContinuousLM)
    assert (loaded.config.input, loaded.config.extra_passes, loaded.config.use_h1) == ("fuse", 1, True)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"mode": "analogue"}, "'discrete' or 'continuous'"),
        ({"input": "add"}, "'replace' or 'fuse'"),
        ({"feedback": "words"}, "'state' or 'distribution' or 'word'"),
        ({"feedback": "word", "mode": "discrete"}, "feedback says what mode=continuous feeds back"),
        ({"input": "fuse", "mode": "discrete"}, "input says how mode=continuous reads a state"),
        ({"extra_passes": -1}, "whole number"),
        ({"use_h1": True}, "extra_passes"),
        ({"use_h1": 1, "extra_passes": 1}, "true or false"),
        ({"extra_pass": 1}, "extra_passes"),
        ({"pass_residual": True}, "pass_residual leads from one pass to the next"),
        ({"gate_bias": -3}, "gate_bias is that of the gate of input=fuse"),
        ({"gate_bias": float("nan"), "input": "fuse"}, "gate_bias is nan: it must be a finite number"),
    ],
)
def test_values_that_mean_nothing_are_refused(options, word):
    with pytest.raises(UserError, match=word):
        create_model("continuous", **SHAPE, **options)


def test_a_mode_without_weights_is_refused_with_what_to_do():
    ids = torch.randint(61, (1, 4))
    with pytest.raises(UserError, match=r"no weights 'proj'; create_model\('continuous'\)"):
        make("discrete").compute_loss(ids, ids, mode="continuous")
    with pytest.raises(UserError, match="passes is 0: it must be at least 1"):
        make("continuous").compute_loss(ids, ids, passes=0)
    with pytest.raises(UserError, match="extra_pass=True"):
        make("continuous").compute_loss(ids, ids, extra_pass=False, use_h1=True)


def test_a_memory_is_not_kept_of_several_passes():
    layer = InfiniLayer(32, 4, 48, segment_length=4)
    model = ContinuousLM(layers=[layer], vocab_size=61, extra_passes=1).eval()
    with pytest.raises(UserError, match="one pass"):
        model(torch.ones(1, 4).long(), update_memory=True)
    one = ContinuousLM(layers=[create_layer(layer.spec)], vocab_size=61, extra_passes=0, mode="discrete").eval()
    with torch.no_grad():
        one(torch.ones(1, 4).long(), update_memory=True)
    with pytest.raises(UserError, match="one pass"):
        model.set_memory_state(one.get_memory_state())
    model.reset_memory()
    assert model.get_memory_state() == {}


def test_normalisation_is_that_of_a_layer_norm_without_parameters():
    h = torch.randn(3, 32, dtype=torch.float64)
    torch.testing.assert_close(normalise(h), F.layer_norm(h, (32,)))
