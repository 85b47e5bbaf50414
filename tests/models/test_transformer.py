"""The model around the layers: what the contract over all layer types does not ask."""

import pytest
import torch

from newllm.errors import UserError
from newllm.evaluation.checks import CHECK_SHAPE
from newllm.models import TransformerLM, create_model, load_model, preset_names
from newllm.models.layers import PythiaLayer


@pytest.mark.parametrize("name", ["pythia", "mla", "infini"])
def test_torch_compile_reads_a_model_as_it_is(name):
    """With rotary positions, whose table is kept between layers where nothing is compiled; and through a cache."""
    model, ids = create_model(name, **CHECK_SHAPE).double().eval(), torch.randint(61, (2, 12))
    torch._dynamo.reset()
    with torch.no_grad():
        compiled, expected = torch.compile(model, backend="eager"), model(ids).logits
        torch.testing.assert_close(compiled(ids).logits, expected, rtol=1e-10, atol=1e-10)
        first = compiled(ids[:, :9], use_cache=True)
        second = compiled(ids[:, 9:], past_key_values=first.past_key_values)
        both = torch.cat([first.logits, second.logits], dim=1)
        torch.testing.assert_close(both, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("shape", [(2, 0), (0, 7), (0, 0), (0, 1)])
def test_no_tokens_and_no_rows_give_empty_logits(name, shape):
    model, ids = create_model(name, **CHECK_SHAPE).eval(), torch.randint(61, shape)
    for inputs in ({}, {"use_cache": True}, {"attention_mask": torch.ones(shape)}):
        with torch.no_grad():
            assert model(ids, **inputs).logits.shape == (*shape, 61)
    if shape[0]:
        cache = model(torch.randint(61, (2, 5)), use_cache=True).past_key_values
        before = cache.export()
        for inputs in ({}, {"attention_mask": torch.ones(shape)}, {"attention_mask": torch.ones(2, 5 + shape[1])}):
            assert model(ids, past_key_values=cache, **inputs).logits.shape == (*shape, 61)
        assert all(torch.equal(tensor, before[name]) for name, tensor in cache.export().items())


@pytest.mark.parametrize("name", ["pythia", "continuous", "selective"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_ids_beside_embeddings_and_nothing_at_all_are_refused(name, use_cache):
    model, ids = create_model(name, **CHECK_SHAPE).eval(), torch.randint(61, (2, 5))
    for given in ({}, {"input_ids": ids, "inputs_embeds": model.embed(ids)}):
        with pytest.raises(UserError, match=r"^a model reads input_ids or inputs_embeds: give one of them$"):
            model(**given, use_cache=use_cache)


@pytest.mark.parametrize(
    ("size", "value"),
    [("num_heads", 0), ("num_layers", 2.0), ("num_layers", 0), ("intermediate_size", -1), ("vocab_size", 0)],
)
@pytest.mark.parametrize("name", ["pythia", "mla", "context_vector"])
def test_a_size_no_model_has_is_told_by_its_name(name, size, value):
    with pytest.raises(UserError, match=f"^{size} is {value}: it must be a whole number of at least 1$"):
        create_model(name, **CHECK_SHAPE | {size: value})


def test_a_model_of_nothing_is_refused():
    for layers in (None, []):
        with pytest.raises(UserError, match="give one of them"):
            TransformerLM(layers=layers)


def test_a_model_is_found_in_a_run_folder_or_its_own_however_the_path_is_typed(monkeypatch, tmp_path):
    create_model("pythia", **CHECK_SHAPE).save_pretrained(tmp_path / "run" / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("~/run", "~/run/model", tmp_path / "run"):
        assert isinstance(load_model(folder), TransformerLM)
    with pytest.raises(UserError, match=r"^no model in ~/other: expected a run folder"):
        load_model("~/other")


def test_an_error_that_says_nothing_is_told_too(monkeypatch, tmp_path):
    create_model("pythia", **CHECK_SHAPE).save_pretrained(tmp_path)

    def load(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(TransformerLM, "from_pretrained", load)
    with pytest.raises(UserError, match=r"cannot load the model in .*: no message"):
        load_model(tmp_path)


def test_layers_that_are_given_begin_as_the_models_own_and_those_of_a_model_stay():
    layer = PythiaLayer(16, 2, 16)
    torch.nn.init.ones_(layer.qkv.weight)
    model = TransformerLM(layers=[layer], vocab_size=11, initializer_range=0.01)
    assert layer.qkv.weight.std() < 0.02
    torch.nn.init.ones_(model.layers[0].qkv.weight)
    assert (TransformerLM(layers=list(model.layers), vocab_size=11).layers[0].qkv.weight == 1).all()


def test_embeddings_begin_with_a_standard_deviation_of_their_own(tmp_path):
    shape = {**CHECK_SHAPE, "vocab_size": 500}
    torch.manual_seed(0)
    usual = create_model("pythia", **shape)
    torch.manual_seed(0)
    larger = create_model("pythia", **shape, embedding_std=0.2)
    std = {name: weight.std().item() for name, weight in larger.named_parameters() if weight.dim() == 2}
    assert usual.embed.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert std.pop("embed.weight") == pytest.approx(0.2, rel=0.05)
    assert list(std.values()) == pytest.approx([0.02] * len(std), rel=0.05)
    torch.nn.init.ones_(larger.embed.weight)
    larger.save_pretrained(tmp_path)
    assert (load_model(tmp_path).embed.weight == 1).all(), "what was trained stays"
    # What a state brings into the layers is as large as an embedding.
    fed_back = create_model("continuous_fuse", **shape, embedding_std=0.2).proj.weight
    assert fed_back.std().item() == pytest.approx(0.2 / shape["hidden_size"] ** 0.5, rel=0.1)
