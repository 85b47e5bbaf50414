"""Context vectors: the first New-LLM by its formulas, scan = loop, time scales, models that feed contexts back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_recurrent import lively

from newllm.errors import UserError
from newllm.evaluation.checks import check_model
from newllm.models import TransformerLM, create_model, load_model
from newllm.models.cache import RecurrentState, bytes_of
from newllm.models.layers import create_layer
from newllm.models.recurrent import RecurrentLM, lag

SHAPE = {"hidden_size": 16, "num_layers": 3, "num_heads": 2, "intermediate_size": 24, "vocab_size": 40}
LAYER = {"type": "context", "hidden_size": 16, "num_heads": 2, "intermediate_size": 24}
TIGHT = {"rtol": 1e-10, "atol": 1e-10}
NONLINEAR = (
    "context_plain",
    "context_plain:gates=update,num_contexts=3,conv_size=3",
    "context_plain:gates=update_forget,num_contexts=2,time_scales.long=20",
    "context_hybrid:gates=update",
)


def make(model, **options):
    return lively(create_model(model, **SHAPE | options)).double().eval()


def make_layer(**options):
    layer = create_layer(LAYER | options).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def places(ids):
    return torch.arange(ids.shape[1]).expand(ids.shape)


# The first New-LLM


def test_the_first_new_llm_computes_what_its_formulas_say():
    model = create_model("context_vector", **SHAPE, context_size=6, width=10, depth=3, max_positions=4).double().eval()
    ids = torch.randint(40, (1, 7))
    first = torch.cat([model.read_text.weight, model.read_context.weight], dim=1)  # one map of [embedding; context]
    assert first.shape == (10, 16 + 6)
    c, logits = torch.zeros(6, dtype=torch.float64), []
    for t, token in enumerate(ids[0]):
        embedded = model.embed.weight[token] + model.positions.weight[min(t, 3)]  # later tokens have the last position
        h = (first @ torch.cat([embedded, c]) + model.read_text.bias).relu()
        for linear in model.deeper:
            h = (linear.weight @ h + linear.bias).relu()
        logits.append(model.head.weight @ h)
        c = c + model.move.weight @ h + model.move.bias
    assert len(model.deeper) == 2
    torch.testing.assert_close(model(ids).logits[0], torch.stack(logits), **TIGHT)


@torch.no_grad()
def test_the_first_new_llm_begins_stable_and_with_a_difference_between_words():
    """Nothing bounds its context: with larger initial values it explodes within a window, with smaller ones the words
    are lost on their way through the MLP."""
    model = create_model("context_vector", **SHAPE | {"hidden_size": 64})
    ids = torch.randint(40, (8, 256))
    hidden = model.hidden_states(ids)
    assert hidden[:, -1].abs().max() < 10 * hidden[:, 0].abs().max()
    first = model.hidden_states(torch.arange(40)[:, None])[:, 0]
    assert first.var(dim=0).sum() > 1e-4 * first.square().mean(dim=0).sum()


def test_the_first_new_llm_refuses_what_it_cannot_be():
    for options, words in (
        ({"depth": 0}, "depth is 0"),
        ({"context_size": 2.5}, "context_size is 2.5"),
        ({"dropout": 1.0}, r"dropout is 1.0: it must lie in \[0, 1\)"),
        ({"dropout": "high"}, r"dropout is 'high': it must lie in \[0, 1\)"),
        ({"dropout": None}, r"dropout is None: it must lie in \[0, 1\)"),
        ({"width": [4]}, r"width is \[4\]: it must be a whole number"),
        ({"max_positions": True}, "max_positions is True: it must be a whole number"),
        ({"tie_word_embeddings": True}, "differ in width"),
    ):
        with pytest.raises(UserError, match=words):
            create_model("context_vector", **SHAPE, **options)


# The layer


@pytest.mark.parametrize("options", [{}, {"num_contexts": 3}, {"num_contexts": 2, "time_scales": None}])
def test_the_scan_of_gated_linear_contexts_equals_their_loop(options):
    cell = make_layer(**options).cell
    x = torch.randn(2, 300, 16, dtype=torch.float64)
    with torch.no_grad():
        fast, driven = cell(x, None, None), cell.project(x)
        c = torch.zeros_like(fast[:, 0])
        for t in range(300):
            a, b = cell._factors(driven[:, t])
            c = a * c + b
            torch.testing.assert_close(fast[:, t], c, **TIGHT)


def test_time_scales_are_what_a_context_begins_with():
    """Without input (weights 0), what was written fades by 1 − 1/τ a token, with τ spread between short and long."""
    model = create_model("context", **SHAPE, num_contexts=2, time_scales={"short": 3, "long": 30})
    cell = model.layers[0].cell
    torch.nn.init.zeros_(cell.project.weight)
    before = torch.ones(1, 2, 16)
    with torch.no_grad():
        after = cell(torch.zeros(1, 1, 16), None, before)[0, 0]
    scales = 1 / (1 - after)
    torch.testing.assert_close(scales.amin(dim=1), torch.full((2,), 3.0), rtol=1e-3, atol=0)
    torch.testing.assert_close(scales.amax(dim=1), torch.full((2,), 30.0), rtol=1e-3, atol=0)
    assert (scales[0] - scales[1]).abs().min() > 0.1  # numbers that share a candidate live differently long
    plain = create_model("context", **SHAPE, time_scales=None).layers[0].cell
    torch.testing.assert_close(plain.rates.sigmoid(), torch.full_like(plain.rates, 0.5))


@pytest.mark.parametrize("gates", ["none", "update", "update_forget", "input"])
@torch.no_grad()
def test_under_bf16_weights_a_context_fades_as_its_rates_say(gates):
    """1 − 1/τ takes more than bf16's eight bits: of τ = 500 tokens it would make 256, or no end."""
    cell = make_layer(gates=gates, time_scales={"short": 300, "long": 900}).cell.bfloat16()
    cell.reset_parameters()
    for name, parameter in cell.named_parameters():
        if name != "rates":
            torch.nn.init.zeros_(parameter)  # nothing is written
    x = torch.zeros(1, 400, 16, dtype=torch.bfloat16)
    after = cell(x, None, torch.ones(1, 1, 16))[0, -1, 0]
    rates = cell.rates.double().sigmoid()[-16:]
    torch.testing.assert_close(after.double(), (1 - rates) ** 400, rtol=1e-3, atol=0)


@torch.no_grad()
def test_the_first_new_llm_sums_its_context_in_float32_under_bf16_weights(tmp_path):
    model = create_model("context_vector", **SHAPE).bfloat16().eval()
    ids = torch.randint(40, (1, 700))
    cache = model.make_cache()
    hidden = torch.cat([model.hidden_states(part, past_key_values=cache) for part in ids.split(350, dim=1)], dim=1)
    state = cache.layers[-1].read("state")
    assert state.dtype == torch.float32
    torch.testing.assert_close(state.double(), model.move(hidden).double().sum(dim=1), rtol=1e-4, atol=1e-4)
    assert bytes_of(cache.layers[-1].tensors().values()) == sum(model.state_bytes(700, 2)) == 16 * 4
    restored = model.make_cache()
    restored.restore(cache.export())
    again = [model(ids[:, :5], past_key_values=c).logits for c in (cache, restored)]
    assert torch.equal(*again)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path, dtype=torch.bfloat16).eval()(ids[:, :9]).logits, model(ids[:, :9]).logits)


@pytest.mark.parametrize("name", ["context_vector", *NONLINEAR, "context_pythia"])
def test_state_bytes_are_their_closed_form_under_bf16_weights(name):
    found = {result.name: result for result in check_model(make(name).bfloat16(), tokens=20)}
    assert found["bytes"].passed, found["bytes"].detail
    assert found["saved"].passed, found["saved"].detail


def test_variance_of_what_is_written_is_kept_whatever_the_time_scale():
    layer = make_layer(time_scales={"short": 2, "long": 50}, context_size=32)
    layer.cell.reset_parameters()
    cell = layer.cell
    with torch.no_grad():
        cell.project.weight[32:] = 0  # gates do not depend on the token
        cell.project.bias.zero_()
        cell.project.weight[:32] = torch.randn(32, 16, dtype=torch.float64) / 4
        contexts = cell(torch.randn(64, 300, 16, dtype=torch.float64), None, None)
        written = cell.project(torch.randn(64, 300, 16, dtype=torch.float64))[..., :32].var(dim=(0, 1))
    assert ((contexts[:, 200:, 0].var(dim=(0, 1)) / written).log().abs() < 0.5).all()


def test_it_has_about_as_many_parameters_as_the_baselines_layer():
    shape = {"hidden_size": 256, "num_heads": 4, "intermediate_size": 1024}
    sizes = [
        sum(p.numel() for p in create_layer({"type": name} | shape).parameters()) for name in ("context", "pythia")
    ]
    assert 1 <= sizes[0] / sizes[1] < 1.003


def test_rates_and_convolution_learn_at_a_rate_of_their_own_where_they_are_told_to():
    for options, own in (({}, ["cell.rates", "taps"]), ({"conv_size": 1, "gates": "update"}, ["cell.rates"])):
        layer = create_layer(LAYER | options | {"own_rate": True})
        named = dict(layer.named_parameters())
        assert [id(gate) for gate in layer.gate_parameters()] == [id(named[name]) for name in own]
        assert create_layer(LAYER | options).gate_parameters() == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gates": "inputs"}, "^unknown gates 'inputs' of context vectors: did you mean 'input'"),
        ({"gates": ["update"]}, r"^unknown gates '\['update'\]' of context vectors"),
        ({"gates": {"update": 1}}, r"^unknown gates '\{'update': 1\}' of context vectors"),
        ({"gates": None}, "^unknown gates 'None' of context vectors"),
        ({"context_size": "wide"}, "^context_size is 'wide': it must be a whole number"),
        ({"num_contexts": [2]}, r"^num_contexts is \[2\]: it must be a whole number"),
        ({"conv_size": {}}, r"^conv_size is \{\}: it must be a whole number"),
        ({"mlp": "no"}, "^mlp is 'no': it must be true or false"),
        ({"time_scales": {"long": "late"}}, "^time_scales.long is 'late': it must be a number of tokens above 1"),
        ({"time_scales": {"long": float("nan")}}, "^time_scales.long is nan: it must be a number of tokens above 1"),
        ({"time_scales": 256}, "^time_scales is 256: it must be null or tokens"),
        ({"context_size": 7}, "context_size 7 does not divide into num_heads 2"),
        ({"num_contexts": 0}, "num_contexts is 0"),
        ({"conv_size": 0}, "conv_size is 0"),
        ({"mlp": 1}, "mlp is 1"),
        (
            {"own_rate": True, "gates": "none", "time_scales": None, "conv_size": 1},
            "this layer has neither, leave it out",
        ),
        ({"time_scales": {"long": 1}}, "time_scales.long is 1: it must be a number of tokens above 1"),
        ({"time_scales": {"middle": 9}}, "'middle'"),
        ({"time_scales": [2, 9]}, "it must be null or tokens, as in time_scales.long=256"),
        ({"gates": "none", "num_contexts": 2, "time_scales": None}, "all would be the same vector"),
    ],
)
def test_a_wrong_option_is_told(options, words):
    with pytest.raises(UserError, match=words):
        create_layer(LAYER | options)
    if not options.keys() & {"conv_size", "mlp"} and options != {"context_size": 7}:  # its cell has one head
        with pytest.raises(UserError, match=words):
            create_model("context_pythia", **SHAPE, **options)


# Models


@pytest.mark.parametrize("name", NONLINEAR)
@torch.no_grad()
def test_the_layers_own_loops_are_the_true_recurrence_of_iterate(name):
    """The general recurrence, one token after the other through `iterate`, and as many passes as tokens."""
    model = make(name)
    ids = torch.randint(40, (2, 11))
    truth = model.hidden_states(ids)
    states, hidden, cache = model.no_states(ids)[:, :1], [], model.make_cache()
    for t in range(11):
        h, states = model.iterate(ids[:, t : t + 1], states, positions=places(ids)[:, t : t + 1], cache=cache)
        hidden.append(h)
    torch.testing.assert_close(torch.cat(hidden, dim=1), truth, **TIGHT)
    states = model.first_states(ids, places(ids))
    for _ in range(10):
        whole, states = model.iterate(ids, lag(states), positions=places(ids))
    torch.testing.assert_close(whole, truth, **TIGHT)
    assert states.shape == (2, 11, model.state_size)


@pytest.mark.parametrize("name", [*NONLINEAR, "context_pythia", "context_pythia:gates=input,num_contexts=2"])
def test_every_form_keeps_the_whole_contract(name):
    results = check_model(make(name), tokens=20)
    assert [result for result in results if result.passed is not True] == []


@settings(max_examples=6)
@given(pads=st.lists(st.integers(0, 5), min_size=2, max_size=2), length=st.integers(1, 7))
@torch.no_grad()
def test_left_padding_changes_nothing_in_iterate(pads, length):
    for name in ("context_plain:gates=update,conv_size=3", "context_pythia"):
        model = make(name)
        width = length + max(pads)
        ids, mask = torch.randint(40, (2, width)), torch.arange(width) >= torch.tensor(pads)[:, None]
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        states = model.first_states(ids, positions, mask)
        hidden, _ = model.iterate(ids, lag(states, mask), positions=positions, mask=mask)
        for row, pad in enumerate(pads):
            alone = ids[row : row + 1, pad:]
            states = model.first_states(alone, places(alone))
            expected, _ = model.iterate(alone, lag(states), positions=places(alone))
            torch.testing.assert_close(hidden[row, pad:], expected[0], **TIGHT)


@torch.no_grad()
def test_linear_contexts_feed_nothing_back_and_read_as_in_any_model():
    model = make("context_hybrid")
    assert isinstance(model, RecurrentLM)
    assert model.state_size == 0
    assert [layer.type_name for layer in model.layers] == ["context", "context", "pythia"]
    same = (
        TransformerLM(layers=[create_layer(spec) for spec in model.config.layer_specs], vocab_size=40).double().eval()
    )
    same.load_state_dict(model.state_dict())
    ids = torch.randint(40, (2, 13))
    assert torch.equal(same(ids).logits, model(ids).logits)


@torch.no_grad()
def test_what_is_fed_back_stands_in_the_cache_only_once():
    model = make("context_plain:gates=update")
    cache = model.make_cache()
    model(torch.randint(40, (2, 5)), past_key_values=cache)
    assert len(cache.layers) == 3
    assert sum(state.tensors()["contexts"][0].numel() for state in cache.layers) == model.state_size == 3 * 16


@torch.no_grad()
def test_context_pythia_is_pythia_with_a_cell_before_it(monkeypatch):
    model, pythia = make("context_pythia"), make("pythia")
    calls = []
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.randint(40, (2, 9))
    with_context = model(ids).logits
    assert len(calls) == 3  # the loop over time is the cell's alone
    pythia.load_state_dict({name: t for name, t in model.state_dict().items() if not name.startswith("context.")})
    assert not torch.allclose(with_context, pythia(ids).logits)
    for parameter in model.context.out.parameters():
        parameter.zero_()
    torch.testing.assert_close(model(ids).logits, pythia(ids).logits, **TIGHT)
    assert isinstance(model.make_cache().layers[-1], RecurrentState)


@pytest.mark.parametrize("name", ["context_vector", "context_plain", "context_pythia"])
@torch.no_grad()
def test_a_saved_model_is_loaded_as_what_it_was(name, tmp_path):
    model = create_model(name, **SHAPE).eval()
    model.save_pretrained(tmp_path)
    loaded, ids = load_model(tmp_path).eval(), torch.randint(40, (2, 9))
    assert type(loaded) is type(model)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_hybrid_needs_a_layer_of_each_kind():
    with pytest.raises(UserError, match="num_layers must be at least that many"):
        create_model("context_hybrid", **SHAPE | {"num_layers": 1})
