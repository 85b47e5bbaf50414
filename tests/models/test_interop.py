"""Equal to Hugging Face's GPT-NeoX: logits, cached decoding, and the way back."""

import pytest
import torch
from logits import max_logit_difference
from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM

from newllm.errors import UserError
from newllm.models import create_model
from newllm.models.interop import from_gpt_neox, to_gpt_neox


@pytest.fixture(scope="module")
def pair():
    """Both models at the 70M shape with the same random weights."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=50304, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048
    )
    theirs = GPTNeoXForCausalLM(config).eval()
    for parameter in theirs.parameters():  # far from the initial, nearly uniform attention; biases not zero
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return from_gpt_neox(theirs), theirs


def test_parameter_count_is_pythia_70m(pair):
    assert sum(parameter.numel() for parameter in pair[0].parameters()) == 70_426_624


def test_logits_equal_at_2048_tokens(pair):
    assert max_logit_difference(*pair, torch.randint(50304, (1, 2048))) <= 1e-4


def test_logits_equal_token_by_token_through_both_caches(pair):
    ours, theirs = pair
    ids = torch.randint(50304, (1, 2048))
    caches = ours.make_cache(), DynamicCache(config=theirs.config)
    with torch.no_grad():
        for chunk in ids.split([*[1] * 40, 460, *[1] * 40, 968, *[1] * 40, 460, *[1] * 40], dim=1):
            a = ours(chunk, past_key_values=caches[0], logits_to_keep=1).logits
            b = theirs(chunk, past_key_values=caches[1], logits_to_keep=1).logits
            assert (a - b).abs().max() <= 1e-4


def test_round_trip_is_bit_equal(pair):
    there_and_back = from_gpt_neox(to_gpt_neox(pair[0])).state_dict()
    for name, tensor in pair[0].state_dict().items():
        assert torch.equal(there_and_back[name], tensor), name
    theirs_again = to_gpt_neox(pair[0]).state_dict()
    for name, tensor in pair[1].state_dict().items():
        assert torch.equal(theirs_again[name], tensor), name


@pytest.mark.parametrize(
    "options", [{"num_kv_heads": 1}, {"position": "none"}, {"window": 8}, {"layer_norm_eps": 1e-6}]
)
def test_what_gpt_neox_cannot_express_is_refused(options):
    model = create_model(
        "pythia", hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, vocab_size=50, **options
    )
    with pytest.raises(UserError, match="GPT-NeoX"):
        to_gpt_neox(model)


@pytest.mark.parametrize("name", ["context", "context_vector", "context_pythia", "continuous", "selective", "dproj"])
def test_a_model_that_is_more_than_its_layers_is_refused(name):
    model = create_model(name, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, vocab_size=50)
    with pytest.raises(UserError, match="only a model of equal 'pythia' layers"):
        to_gpt_neox(model)


def test_a_discrete_model_is_pythia_there_too():
    model = create_model("discrete", hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, vocab_size=50)
    assert max_logit_difference(model.eval(), to_gpt_neox(model).eval(), torch.randint(50, (2, 9))) <= 1e-5


def test_a_sequential_residual_goes_there_and_back():
    config = GPTNeoXConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        use_parallel_residual=False,
    )
    theirs = GPTNeoXForCausalLM(config).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    ours = from_gpt_neox(theirs)
    ids = torch.randint(50, (2, 20))
    assert max_logit_difference(ours, theirs, ids) <= 1e-5
    assert max_logit_difference(ours, to_gpt_neox(ours), ids) <= 1e-5
