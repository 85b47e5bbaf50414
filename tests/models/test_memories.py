"""Layers with compressive memories: what the contract over all layer types does not ask."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from newllm import TransformerLM, create_model
from newllm.errors import UserError
from newllm.evaluation.checks import CHECK_SHAPE, check_model
from newllm.models.cache import bytes_of
from newllm.models.layers import HierarchicalLayer, InfiniLayer, MultiMemoryLayer, PythiaLayer, create_layer

SHAPE = {name: CHECK_SHAPE[name] for name in ("hidden_size", "num_heads", "intermediate_size")}
D = SHAPE["hidden_size"]
TYPES = pytest.mark.parametrize("name", ["infini", "multi_memory", "hierarchical"])
S = 4


def make(name, **options):
    layer = create_layer({"type": name, **SHAPE, "segment_length": S, **options}).double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def run(layer, x, state=None, mask=None):
    positions = torch.arange(x.shape[1]).expand(x.shape[:2])
    return layer(x, positions=positions, mask=mask, state=state)


@TYPES
@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("T", [1, S - 1, S, S + 1, 2 * S - 1, 2 * S, 2 * S + 1, 5 * S + 1])
def test_at_segment_boundaries_naive_equals_whole_equals_token_by_token(name, delta, T):
    layer = make(name, use_delta_rule=delta)
    x = torch.randn(2, T, D, dtype=torch.float64)
    positions = torch.arange(T).expand(2, T)
    whole = run(layer, x)
    torch.testing.assert_close(whole, layer.reference(x, positions=positions, mask=None), rtol=1e-10, atol=1e-10)
    state = layer.make_state()
    tokens = torch.cat([run(layer, x[:, t : t + 1], state) for t in range(T)], dim=1)
    torch.testing.assert_close(tokens, whole, rtol=1e-10, atol=1e-10)
    assert state.tensors()["filled"].tolist() == [T % S] * 2
    assert state.tensors()["written"].tolist() == [T // S] * 2


@TYPES
@given(data=st.data())
def test_ragged_rows_read_as_if_alone(name, data):
    """Padding anywhere, other in every row and chunk: each row's real tokens are read as without it."""
    layer = make(name)
    sizes = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
    T = sum(sizes)
    mask = torch.tensor([data.draw(st.lists(st.booleans(), min_size=T, max_size=T)) for _ in range(3)])
    x = torch.randn(3, T, D, dtype=torch.float64)
    state, outputs, start = layer.make_state(), [], 0
    with torch.no_grad():
        for size in sizes:
            stop = start + size
            outputs.append(run(layer, x[:, start:stop], state, mask[:, :stop]))
            start = stop
        together = torch.cat(outputs, dim=1)
        for row in range(3):
            real = mask[row].nonzero()[:, 0]
            if len(real):
                alone = run(layer, x[row : row + 1, real])
                torch.testing.assert_close(together[row : row + 1, real], alone, rtol=1e-10, atol=1e-10)
        assert state.tensors()["written"].tolist() == (mask.sum(1) // S).tolist()


@TYPES
def test_a_stream_of_batches_with_resets_at_document_starts_reads_each_document_as_if_alone(name):
    model = create_model(name, **CHECK_SHAPE, segment_length=S, window=5).double().eval()
    rows, T = [[9, 22, 3], [13, 18]], 6  # lengths of the documents in each row; tokens of a chunk
    documents = [[torch.randint(61, (n,)) for n in row] for row in rows]
    chunks = [[(d, start) for d, n in enumerate(row) for start in range(0, n, T)] for row in rows]
    found = [[torch.zeros(n, 61, dtype=torch.float64) for n in row] for row in rows]
    cache, past = model.make_cache(), torch.zeros(2, 0)
    with torch.no_grad():
        for index in range(max(map(len, chunks))):
            ids, mask, positions = torch.zeros(2, T, dtype=torch.long), torch.zeros(2, T), torch.arange(T).repeat(2, 1)
            places = {row: own[index] for row, own in enumerate(chunks) if index < len(own)}
            for row, (d, start) in places.items():
                text = documents[row][d][start : start + T]
                ids[row, : len(text)], mask[row, : len(text)] = text, 1
                positions[row] += start
            cache.reset_rows(torch.tensor([row in places and places[row][1] == 0 for row in range(2)]))
            past = torch.cat([past, mask], dim=1)
            logits = model(ids, past_key_values=cache, attention_mask=past, position_ids=positions).logits
            for row, (d, start) in places.items():
                read = int(mask[row].sum())
                found[row][d][start : start + read] = logits[row, :read]
        for own, read in zip(documents, found, strict=True):
            for document, logits in zip(own, read, strict=True):
                torch.testing.assert_close(logits, model(document[None]).logits[0], rtol=1e-9, atol=1e-9)


@TYPES
def test_state_shared_between_rows_is_caught(name, monkeypatch):
    """Memories summed over the batch, the mistake the check on rows is there for."""
    from newllm.models.layers import compressive

    right = compressive.read_segments

    def summed(*arguments, **options):
        found, matrix, normaliser = right(*arguments, **options)
        share = found.reads.mean(dim=0, keepdim=True).expand_as(found.reads)
        return found._replace(reads=share), matrix, normaliser

    monkeypatch.setattr(compressive, "read_segments", summed)
    model = create_model(name, **CHECK_SHAPE, segment_length=S).double()
    results = {result.name: result for result in check_model(model, tokens=24)}
    assert results["rows"].passed is False


@pytest.mark.parametrize("name", ["multi_memory", "hierarchical"])
def test_relevance_that_looks_at_later_tokens_is_caught(name, monkeypatch):
    """Relevance averaged over the sequence, as the origin had it."""
    from newllm.models.layers import multi_memory

    right = multi_memory.mix_by

    def averaged(logits, found):
        return right(logits.mean(dim=(3, 4), keepdim=True).expand_as(logits), found)

    monkeypatch.setattr(multi_memory, "mix_by", averaged)
    model = create_model(name, **CHECK_SHAPE, segment_length=S).double()
    results = {result.name: result for result in check_model(model, tokens=24)}
    assert results["future"].passed is False


def test_memory_bytes_are_those_of_the_closed_form_at_pythia_70m():
    for options, expected in (
        ({"memory_head_dim": 64}, 133_120),
        ({}, 1_050_624),
        ({"memory_head_dim": 64, "num_memory_banks": 4}, 4 * 133_120),
    ):
        layer = InfiniLayer(512, 8, 2048, segment_length=8, **options)
        state = layer.make_state()
        with torch.no_grad():
            run(layer, torch.randn(1, 20, 512), state)
        memory = state.memory()
        assert bytes_of([memory["matrix"], memory["normaliser"]]) == layer.memory_bytes() == expected
    many = MultiMemoryLayer(512, 8, 2048, memory_head_dim=64)
    assert many.memory_bytes() == HierarchicalLayer(512, 8, 2048, memory_head_dim=64).memory_bytes() == 4 * 133_120


def test_the_state_is_as_large_after_a_hundred_thousand_tokens_as_after_one():
    layer = InfiniLayer(16, 2, 16, segment_length=64)
    state, sizes = layer.make_state(), []
    with torch.no_grad():
        for _ in range(100):
            run(layer, torch.randn(1, 1000, 16), state)
            sizes.append(bytes_of(state.tensors().values()))
    assert state.seen == 100_000
    assert set(sizes) == {layer.state_bytes(1, 4)}


def test_the_gate_counts_for_nothing_while_the_memory_is_empty():
    layer = make("infini")
    x = torch.randn(1, 2 * S, D, dtype=torch.float64)
    before = run(layer, x)
    with torch.no_grad():
        layer.beta.fill_(20)  # all memory, no attention
    after = run(layer, x)
    assert torch.equal(before[:, :S], after[:, :S])
    assert not torch.allclose(before[:, S:], after[:, S:])


def test_a_closed_gate_leaves_local_attention():
    layer = make("infini")
    local = make("infini", num_memory_banks=0)
    local.load_state_dict({name: value for name, value in layer.state_dict().items() if name != "beta"})
    x = torch.randn(2, 3 * S + 1, D, dtype=torch.float64)
    with torch.no_grad():
        layer.beta.fill_(-1000)
    torch.testing.assert_close(run(layer, x), run(local, x), rtol=1e-12, atol=1e-12)


def test_frozen_memories_are_read_but_not_written():
    layer = make("multi_memory", num_memories=3)
    x = torch.randn(2, 7 * S, D, dtype=torch.float64)
    with torch.no_grad():
        state = layer.make_state()
        run(layer, x[:, : 3 * S], state)
        before = {name: tensor.clone() for name, tensor in state.memory().items()}
        layer.frozen = {0, 2}
        run(layer, x[:, 3 * S :], state)
        after = state.memory()
        for n in (0, 2):
            assert torch.equal(after["matrix"][:, n], before["matrix"][:, n])
        assert not torch.equal(after["matrix"][:, 1], before["matrix"][:, 1])
        layer.frozen = {0, 1, 2}
        run(layer, x[:, :S], state)
        assert torch.equal(state.memory()["matrix"], after["matrix"])


def test_a_memory_of_one_row_serves_any_batch():
    layer = make("hierarchical")
    with torch.no_grad():
        state = layer.make_state()
        run(layer, torch.randn(1, 3 * S, D, dtype=torch.float64), state)
        x = torch.randn(3, S + 2, D, dtype=torch.float64)
        many = layer.make_state()
        many.set_memory(state.memory())
        together = run(layer, x, many)
        for row in range(3):
            one = layer.make_state()
            one.set_memory(state.memory())
            torch.testing.assert_close(run(layer, x[row : row + 1], one), together[row : row + 1])
        assert not torch.allclose(run(layer, x), together)


def test_pending_tokens_are_written_as_a_segment_of_their_own():
    layer, x = make("infini"), torch.randn(1, S + 2, D, dtype=torch.float64)
    short = make("infini", segment_length=S)
    short.load_state_dict(layer.state_dict())
    with torch.no_grad():
        state = layer.make_state()
        run(layer, x, state)
        layer.write_pending(state)
        assert state.tensors()["filled"].tolist() == [0]
        assert state.tensors()["written"].tolist() == [2]
        # The same associations, from a layer whose segments are as long as what was pending.
        short.segment_length = 2
        other = short.make_state()
        other.set_memory(before(layer, x[:, :S]))
        run(short, x[:, S:], other)
        torch.testing.assert_close(state.memory()["matrix"], other.memory()["matrix"])
        again = {name: tensor.clone() for name, tensor in state.tensors().items()}
        layer.write_pending(state)  # nothing is pending
        assert all(torch.equal(again[name], tensor) for name, tensor in state.tensors().items())


def before(layer, x):
    state = layer.make_state()
    run(layer, x, state)
    return state.memory()


def test_detached_memory_passes_no_gradient_to_what_wrote_it():
    x = torch.randn(1, 2 * S, D, dtype=torch.float64, requires_grad=True)
    for memory_grad, expected in (("through", True), ("detach", False)):
        layer = make("infini", memory_grad=memory_grad)
        (gradient,) = torch.autograd.grad(run(layer, x)[:, S:].sum(), x)
        assert bool(gradient[:, :S].any()) is expected


def test_the_hierarchical_gate_can_be_closed_and_watched():
    model = create_model("hierarchical", **CHECK_SHAPE, segment_length=S).double().eval()
    ids = torch.randint(61, (2, 5 * S))
    opened = []
    hook = model.layers[0].fine_gate.register_forward_hook(lambda module, inputs, gate: opened.append(gate))
    with torch.no_grad():
        base = model(ids).logits
        hook.remove()
        assert opened[0].mean() == 0.5  # as initialised
        with model.layers[0].fine_gate.register_forward_hook(lambda module, inputs, gate: torch.zeros_like(gate)):
            closed = model(ids).logits
    assert torch.equal(base[:, :S], closed[:, :S])
    assert not torch.allclose(base[:, 2 * S :], closed[:, 2 * S :])


def test_a_query_whose_features_underflow_reads_nothing_at_once_and_token_by_token():
    layer = make("infini", local="linear", position="none").float()
    with torch.no_grad():
        layer.qkv.bias[:D] = -1000  # of the queries
        x = torch.randn(1, 2 * S + 1, D)
        state = layer.make_state()
        tokens = torch.cat([run(layer, x[:, t : t + 1], state) for t in range(x.shape[1])], dim=1)
        assert tokens.isfinite().all()
        torch.testing.assert_close(tokens, run(layer, x))


def test_any_mix_of_layers_from_objects():
    layers = [InfiniLayer(64, 4, 80, segment_length=S), *[PythiaLayer(64, 4, 80) for _ in range(2)]]
    model = TransformerLM(layers=layers, vocab_size=61)
    assert [spec["type"] for spec in model.config.layer_specs] == ["infini", "pythia", "pythia"]
    assert create_model("infini", **CHECK_SHAPE, num_memory_banks=2, segments_per_bank=3).layers[0].num_memories == 2


@TYPES
def test_memories_are_computed_in_float32_also_under_autocast(name):
    model = create_model(name, **CHECK_SHAPE, segment_length=S).eval()
    layer, cache = model.layers[0], model.make_cache()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(torch.randint(61, (2, S)), past_key_values=cache)
        state = cache.layers[0]
        assert state.tensors()["keys"].dtype == torch.bfloat16
        keys, values = (state.tensors()[part].float().unflatten(-1, (1, -1)) for part in ("keys", "values"))
        features = keys.movedim(2, 1).clamp(max=0).exp() + keys.movedim(2, 1).clamp(min=0)
        expected = features.double().transpose(2, 3) @ values.movedim(2, 1).double()
    matrix = state.memory()["matrix"]
    assert matrix.dtype == torch.float32
    torch.testing.assert_close(matrix[:, 0].double(), expected, rtol=1e-5, atol=1e-5)
    assert layer.num_memory_heads == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"segment_length": 0}, "segment_length is 0"),
        ({"memory_head_dim": 48}, "does not divide into memory_head_dim 48"),
        ({"local": "sotfmax"}, "did you mean 'softmax'"),
        ({"memory_grad": "no"}, "memory_grad"),
        ({"use_delta_rule": "no"}, "use_delta_rule is 'no': it must be true or false"),
        ({"num_memory_banks": -1}, "num_memory_banks is -1"),
        ({"segments_per_bank": 1.5}, "segments_per_bank is 1.5"),
        ({"num_memories": 2}, "num_memory_banks"),
        ({"local": "linear", "position": "alibi"}, "position is that of local=softmax"),
        ({"num_memory_banks": 0, "key_shift": True}, "key_shift is that of a memory"),
        ({"num_memory_banks": 0, "use_delta_rule": False}, "use_delta_rule is that of a memory"),
        ({"num_memory_banks": 0, "memory_head_dim": 32}, "memory_head_dim is that of a memory"),
    ],
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        create_model("infini_all", **CHECK_SHAPE, **options)
