"""A trained model in other layers: where they keep everything it is the same model, and where not, the nearest."""

import pytest
import torch

from newllm.errors import UserError
from newllm.models import create_model
from newllm.models.adaptation import adapt, directions

SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48, "vocab_size": 60}
GEOMETRIC = {"type": "alibi", "slopes": "geometric"}


def model_of(name, **options):
    """With weights far from the initial ones: biases that are not zero, attention that is not uniform."""
    model = create_model(name, **SHAPE | options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.double()


def texts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(SHAPE["vocab_size"], (8, 16), generator=generator) for _ in range(8)]


@torch.no_grad()
def distance(source, target):
    ids = texts()[0]
    a, b = source(ids).logits, target(ids).logits
    return float((a - b).square().mean().sqrt() / a.std())


@pytest.mark.parametrize(
    ("name", "options", "own"),
    [
        ("pythia", {}, 0),
        ("mla", {"kv_dim": 32}, 0),
        ("mla", {"kv_dim": 70, "rope_dim": 4}, 0),
        ("v_dproj", {"value_dim": 32}, 0),
    ],
)
def test_where_nothing_is_left_out_the_model_is_the_same(name, options, own):
    source, target = model_of("pythia", position=GEOMETRIC), model_of(name, position=GEOMETRIC, **options)
    assert distance(source, target) > 0.1
    assert len(adapt(source, target, texts())) == own
    assert distance(source, target) < 1e-6


def test_a_head_goes_into_one_of_its_own_and_one_of_its_own_into_no_tied_one():
    tied, apart = (model_of("pythia", position=GEOMETRIC, tie_word_embeddings=tie) for tie in (True, False))
    with pytest.raises(UserError, match=r"^the trained model has a head of its own, .*: leave that out$"):
        adapt(apart, tied, texts())
    for target in (apart, model_of("pythia", position=GEOMETRIC, tie_word_embeddings=True)):
        assert adapt(tied, target, texts()) == []
        assert distance(tied, target) < 1e-6


@pytest.mark.parametrize("name", ["pythia", "mla", "v_dproj", "infini"])
def test_an_mlp_that_reads_what_attention_has_added_to_goes_into_another_such_layer_alone(name):
    source = model_of("gpt", position=GEOMETRIC)
    with pytest.raises(UserError, match=r"^layer 0 of the trained model has parallel_residual=false, .*=false$"):
        adapt(source, model_of(name), texts())
    with pytest.raises(UserError, match=r"^layer 0 of the trained model has parallel_residual=true, .*=true$"):
        adapt(model_of(name), model_of("gpt"), texts())
    same = model_of("pythia", position=GEOMETRIC, parallel_residual=False)
    assert adapt(source, same, texts()) == []
    assert distance(source, same) < 1e-6


@pytest.mark.parametrize("name", ["discrete_extra", "selective", "continuous"])
def test_layers_that_read_a_text_several_times_are_adapted_to_all_they_read(name):
    source, target = model_of(name, position=GEOMETRIC), model_of("mla", position=GEOMETRIC, kv_dim=32)
    adapt(source, target, texts())
    x, positions = torch.randn(2, 9, 32, dtype=torch.float64), torch.arange(9).expand(2, 9)
    with torch.no_grad():
        for theirs, ours in zip(source.layers, target.layers, strict=True):
            expected, given = (layer(x, positions=positions, mask=None, state=None) for layer in (theirs, ours))
            torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["mla", "v_dproj"])
def test_the_more_is_kept_the_nearer_it_is(name):
    source, width = model_of("pythia", position=GEOMETRIC), {"mla": "kv_dim", "v_dproj": "value_dim"}[name]
    gaps = []
    for size in (4, 16, 28):
        target = model_of(name, position=GEOMETRIC, **{width: size})
        adapt(source, target, texts())
        gaps.append(distance(source, target))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 0.5 * gaps[0]


def test_directions_lose_least():
    """Less than those of the plain weights, which do not know the text."""
    torch.manual_seed(0)
    y = torch.randn(500, 12, dtype=torch.float64) * torch.logspace(0, -2, 12, dtype=torch.float64)
    y = y @ torch.randn(12, 12, dtype=torch.float64)
    covariance = y.T @ y / len(y)
    lost = [
        float((y - y @ basis @ basis.T).square().sum())
        for basis in (directions(covariance, 4), torch.linalg.qr(torch.randn(12, 4, dtype=torch.float64))[0])
    ]
    assert lost[0] < lost[1]
    assert lost[0] == pytest.approx(float(torch.linalg.eigvalsh(covariance)[:-4].sum()) * len(y))


def test_equal_heads_are_one_head():
    source = model_of("pythia")
    with torch.no_grad():
        for layer in source.layers:
            for part in (layer.qkv.weight, layer.qkv.bias):
                heads = part.unflatten(0, (3, 2, 16))
                heads[1:, 1] = heads[1:, 0]
    target = model_of("mqa")
    assert adapt(source, target, texts()) == []
    assert distance(source, target) < 1e-12


def test_layers_that_nothing_is_known_of_keep_their_own_start():
    source, target = model_of("pythia"), model_of("infini", segment_length=4)
    beta = target.layers[0].beta.clone()
    assert adapt(source, target, texts()) == ["layers.0.beta"]
    assert torch.equal(target.layers[0].beta, beta)
    assert torch.equal(target.layers[0].qkv.weight, source.layers[0].qkv.weight)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_memory_banks": 2, "segments_per_bank": 1, "memory_head_dim": 16, "position": GEOMETRIC},
        {"window": 6, "use_delta_rule": False, "key_shift": True},
    ],
)
@pytest.mark.parametrize("name", ["infini_adapter", "memory_adapter"])
def test_a_memory_beside_the_trained_attention_says_nothing_at_first(name, options):
    trained = {key: value for key, value in options.items() if key in ("position", "window")}
    source, target = model_of("pythia", **trained).float(), model_of(name, segment_length=4, **options).float()
    own = {name for name, _ in target.named_parameters()} - {name for name, _ in source.named_parameters()}
    with torch.no_grad():
        for layer in target.layers:
            layer.reset_parameters()  # the gates, as a new model has them
    assert set(adapt(source, target, texts())) == own
    assert {name.rpartition(".")[2] for name in own} <= {"beta", "bank_weights"}
    ids, cache = texts()[0], target.make_cache()
    with torch.no_grad():
        expected = source(ids).logits
        torch.testing.assert_close(target(ids).logits, expected, atol=1e-6, rtol=0)
        read = torch.cat([target(chunk, past_key_values=cache).logits for chunk in ids.split([7, 1, 8], dim=1)], dim=1)
        torch.testing.assert_close(read, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("alone", [True, False])
def test_the_gate_of_a_memory_beside_the_trained_attention_learns_from_the_first_step(alone):
    source, target = model_of("pythia"), create_model("infini_adapter", **SHAPE, segment_length=4).double()
    adapt(source, target, texts())
    gate, ids = target.layers[0].beta, texts()[0]
    if alone:
        target.requires_grad_(False)
        gate.requires_grad_(True)
    others = [p for p in target.parameters() if p.requires_grad and p is not gate]
    optimizer = torch.optim.AdamW([{"params": [gate], "lr": 0.01}, {"params": others, "lr": 1e-3}], weight_decay=0)
    before = {name: p.detach().clone() for name, p in target.named_parameters()}
    losses = []
    for _ in range(4):
        loss = target(ids, labels=ids).loss
        loss.backward()
        assert gate.grad.abs().min() > 0
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert target.layers[0].gates().abs().min() > 0.01
    moved = {name for name, p in target.named_parameters() if not torch.equal(p, before[name])}
    assert moved == ({"layers.0.beta"} if alone else set(before))


def test_a_checkpoint_with_more_rows_than_words_fits_and_one_with_fewer_does_not():
    source = model_of("pythia")
    adapt(source, target := model_of("pythia", vocab_size=50), texts())
    assert torch.equal(target.head.weight, source.head.weight[:50])
    for change in ({"vocab_size": 61}, {"hidden_size": 48}, {"num_layers": 3}):
        with pytest.raises(UserError, match="trained model has"):
            adapt(source, model_of("pythia", **change), texts())
