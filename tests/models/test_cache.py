"""States that grow with the text, at every precision: what they give back, what they hold, what they refuse."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from newllm.errors import UserError
from newllm.evaluation import cache_bytes
from newllm.evaluation.checks import CHECK_SHAPE, check_layer_types
from newllm.models import create_model, load_model
from newllm.models.cache import PRECISIONS, KeyValueState, LatentState, LMCache, RecurrentState, TokenState
from newllm.models.layers import LAYER_TYPES
from newllm.ops import native
from newllm.ops.quantize import BITS, Quantized, dequantize, quantize

QUANTISED = list(BITS)
TYPES = [name for name, cls in LAYER_TYPES.items() if cls.__module__.startswith("newllm.models")]


def state_of(precision, *args):
    state = TokenState(*args)
    state.precision = precision
    return state


def as_read(x, precision):
    if precision == "model":
        return x
    return dequantize(*quantize(x, BITS[precision]), BITS[precision], x.shape[-1], x.dtype)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    window=st.none() | st.integers(1, 12),
    precision=st.sampled_from(PRECISIONS),
    widths=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40)), min_size=1, max_size=3),
    padded=st.booleans(),
)
def test_any_streams_in_any_chunks_are_read_as_they_were_written(sizes, window, precision, widths, padded):
    total = sum(sizes)
    names = tuple(f"stream{n}" for n in range(len(widths)))
    streams = [torch.randn(2, N, total, d) for N, d in widths]
    everything = [as_read(x, precision) for x in streams]
    real = torch.rand(2, total) > 0.3 if padded else torch.ones(2, total, dtype=torch.bool)
    mask = real if padded else None
    state, stop = state_of(precision, names, window), 0
    for size in sizes:
        start, stop = stop, stop + size
        *read, visible = state.update(
            *(x[:, :, start:stop] for x in streams), mask=None if mask is None else mask[:, :stop]
        )
        first = first_kept(real[:, :start], window)  # what the chunk's first token sees
        for x, expected in zip(read, everything, strict=True):
            assert torch.equal(x, expected[:, :, first:stop])
        assert visible is None if mask is None else torch.equal(visible, mask[:, first:stop])
    kept = total - first_kept(real, window)
    per_token = sum(N * (as_bytes(d, precision)) for N, d in widths)
    assert sum(t.nbytes for t in state.tensors().values()) == 2 * kept * per_token
    assert state.seen == total


def first_kept(real, window):
    """The first of the tokens read so far that is kept: every row's last W − 1 real ones are, and at least W − 1."""
    total = real.shape[1]
    if window is None:
        return 0
    firsts = [row.nonzero()[:, 0].tolist()[-(window - 1) :][0] for row in real if window > 1 and row.any()]
    return max(0, min([total - window + 1, *firsts]))


def as_bytes(d, precision):
    if precision == "model":
        return 4 * d
    codes, scales = quantize(torch.zeros(d), BITS[precision])
    return codes.nbytes + scales.nbytes


@pytest.mark.parametrize("precision", PRECISIONS)
def test_room_grows_by_an_eighth_and_all_streams_share_their_place(precision):
    state = state_of(precision, ("keys", "values"), None)
    for _ in range(300):
        k, v, _mask = state.update(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 4))
    cache = LMCache([state], precision)
    used, allocated = cache_bytes(cache)
    assert used < allocated <= 1.13 * used
    assert len({buffer.shape[2] for buffer in state.buffers.values()}) == 1
    if precision == "model":  # what attention's products of whole buffers rely on
        assert k.storage_offset() // 8 == v.storage_offset() // 4
        assert k.stride(1) // 8 == v.stride(1) // 4 == state.buffers["keys"].shape[2]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_can_be_repeated_selected_reset_exported_and_restored(precision):
    state, twin = (state_of(precision, ("latent",), None) for _ in range(2))
    first, second = torch.randn(2, 1, 5, 48), torch.randn(4, 1, 3, 48)
    state.update(first)
    state.batch_repeat_interleave(2)
    state.reorder_cache(torch.tensor([3, 0, 1, 2]))
    state.reset_rows(torch.tensor([False, True, False, False]))
    twin.restore(dict(reversed(state.export().items())))  # a file may give its tensors in another order
    rows = torch.tensor([1, 0, 0, 1])
    for s in (state, twin):
        read, mask = s.update(second)
        assert torch.equal(read, as_read(torch.cat([first[rows], second], dim=2), precision))
        assert mask.tolist() == [[True] * 8, [False] * 5 + [True] * 3, [True] * 8, [True] * 8]


def damaged(exports, damage):
    """The export of a quantised cache with the second layer spoiled in one way."""
    good, other = exports
    codes, scales = good["1.keys.codes"], good["1.keys.scales"]
    return {
        "other bits": {**good, **{name: t for name, t in other.items() if name.startswith("1.")}},
        "a name missing": {name: t for name, t in good.items() if name != "1.values.scales"},
        "a name too many": good | {"1.latent": scales},
        "a layer missing": {name: t for name, t in good.items() if not name.startswith("1.")},
        "a layer too many": good | {"2.seen": torch.tensor(5)},
        "seen missing": {name: t for name, t in good.items() if name != "1.seen"},
        "codes as numbers": good | {"1.keys.codes": codes.float()},
        "scales too precise": good | {"1.keys.scales": scales.float()},
        "a scale missing": good | {"1.keys.scales": scales[..., :-1]},
        "another width": good | {"1.keys.codes": codes[..., :-3]},
        "fewer heads": good | {"1.keys.codes": codes[:, :1], "1.keys.scales": scales[:, :1]},
        "fewer tokens": good | {"1.keys.codes": codes[:, :, :-1], "1.keys.scales": scales[:, :, :-1]},
        "fewer rows": good | {"1.keys.codes": codes[:1], "1.keys.scales": scales[:1]},
        "no heads": good | {"1.keys.codes": codes[:, 0]},
    }[damage]


# Widths and heads of keys are known to a state that has read some, and to no other.
DAMAGES_OF_FILLED_STATES = ("another width", "fewer heads")
DAMAGES = (
    *("other bits", "a name missing", "a name too many", "a layer missing", "a layer too many", "seen missing"),
    *("codes as numbers", "scales too precise", "a scale missing", "fewer tokens", "fewer rows", "no heads"),
)


@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize(
    ("damage", "filled"),
    [(damage, filled) for damage in DAMAGES for filled in (False, True)]
    + [(damage, True) for damage in DAMAGES_OF_FILLED_STATES],
)
def test_what_cannot_be_restored_is_refused_and_changes_nothing(damage, precision, filled):
    def cache_of(precision, tokens):
        cache = LMCache([KeyValueState(), KeyValueState()], precision)
        for state in cache.layers if tokens else ():
            state.update(torch.randn(2, 3, tokens, 40), torch.randn(2, 3, tokens, 40))
        return cache

    exports = [cache_of(p, 5).export() for p in (precision, *(other for other in QUANTISED if other != precision))]
    cache = cache_of(precision, 7 if filled else 0)
    before = cache.export()
    with pytest.raises(ValueError, match=r"fit|cannot hold|not the states|one batch size"):
        cache.restore(damaged(exports, damage))
    after = cache.export()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    cache.restore(exports[0])
    assert all(torch.equal(t, exports[0][name]) for name, t in cache.export().items())


def test_a_state_alone_counts_tokens_only_once_it_is_restored():
    state, other = state_of("int8", ("latent",), None), state_of("int4", ("latent",), None)
    other.update(torch.randn(1, 1, 4, 64))
    with pytest.raises(ValueError, match=r"latent\.codes does not fit into this state of precision 'int8'"):
        state.restore(other.export())
    assert (state.seen, state.tensors()) == (0, {})


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("reset", [False, True])
def test_the_closed_form_of_bytes_counts_what_a_reset_row_needs(precision, reset):
    plain, state = (state_of(p, ("latent",), None) for p in ("model", precision))
    for s in (plain, state):
        s.update(torch.randn(2, 1, 5, 37))
        if reset:
            s.reset_rows(torch.tensor([True, False]))
    assert plain.bytes_at(precision) == sum(t.nbytes for t in state.tensors().values())


def test_states_of_one_latent_and_of_keys_and_values():
    c = torch.randn(2, 1, 3, 8)
    latent, mask = LatentState(window=3).update(c, torch.ones(2, 3, dtype=torch.bool))
    assert torch.equal(latent, c)
    assert mask.all()
    state = KeyValueState()
    keys, values, none = state.update(c, 2 * c)
    assert torch.equal(values, 2 * keys)
    assert none is None
    assert set(state.tensors()) == {"keys", "values"}


def test_only_what_grows_is_quantised():
    recurrent = RecurrentState()
    cache = LMCache([recurrent, KeyValueState()], "int8")
    recurrent.write(1, memory=torch.randn(2, 4))
    cache.layers[1].update(torch.randn(2, 1, 1, 4), torch.randn(2, 1, 1, 4))
    assert recurrent.read("memory").dtype == torch.float32
    assert {name: t.dtype for name, t in cache.layers[1].tensors().items()} == {
        **{"keys.codes": torch.int8, "values.codes": torch.int8},
        **{"keys.scales": torch.float16, "values.scales": torch.float16},
    }


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", TYPES)
def test_a_cache_begun_in_inference_mode_is_read_on_outside(name, precision):
    model, ids = create_model(name, **CHECK_SHAPE).double().eval(), torch.randint(61, (2, 9))
    caches = [model.make_cache(precision) for _ in range(2)]
    for cache, mode in zip(caches, (torch.inference_mode, torch.no_grad), strict=True):
        with mode():
            model(ids[:, :5], past_key_values=cache)
            cache.reorder_cache(torch.tensor([1, 0]))
            model(ids[:, 5:6], past_key_values=cache)
        with torch.no_grad():
            last = [model(x, past_key_values=cache).logits for x in ids[:, 6:].split(1, dim=1)]
        with torch.inference_mode():
            last.append(model(ids[:, :1], past_key_values=cache).logits)
        cache.found = torch.cat(last, dim=1)
    torch.testing.assert_close(caches[0].found, caches[1].found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", TYPES)
def test_a_static_cache_is_refused_in_one_line(name):
    model, ids = create_model(name, **CHECK_SHAPE).eval(), torch.randint(61, (2, 5))
    with pytest.raises(UserError, match=r"^a static cache cannot hold this model's states: leave .* out$"):
        model.generate(ids, max_new_tokens=3, do_sample=False, cache_implementation="static")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}, "^a quantised .*'int8' or 'int4'$"),
        ({"cache_implementation": "offloaded"}, "^an offloaded cache cannot hold .* leave cache_implementation out$"),
    ],
)
def test_a_cache_whose_kind_would_be_lost_is_refused_in_one_line(options, said):
    """Our states would have taken the place of its layers, neither quantised nor moved, without a word."""
    model, ids = create_model("pythia", **CHECK_SHAPE).eval(), torch.randint(61, (2, 5))
    with pytest.raises(UserError, match=said):
        model.generate(ids, max_new_tokens=3, do_sample=False, **options)


@pytest.mark.parametrize(
    ("name", "other", "options"),
    [
        ("pythia", "gqa", {}),
        ("pythia", "pythia", {"num_layers": 3}),
        ("pythia", "pythia", {"hidden_size": 32}),
        ("infini", "pythia", {}),
        ("discrete", "continuous", {}),
        ("discrete_extra", "discrete_extra_3", {}),
        ("context", "context", {"hidden_size": 32}),
    ],
)
def test_a_cache_of_another_model_is_refused_in_one_line(name, other, options):
    ids = torch.randint(61, (2, 5))
    cache = create_model(other, **CHECK_SHAPE | options).eval()(ids, use_cache=True).past_key_values
    with pytest.raises(UserError, match=r"^past_key_values belongs to a model of other layers: pass None, or .*$"):
        create_model(name, **CHECK_SHAPE).eval()(ids, past_key_values=cache)


def test_a_cache_that_a_model_of_hugging_face_has_filled_is_refused_in_one_line():
    theirs = GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=61, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    )
    ids = torch.randint(61, (2, 5))
    cache = theirs.eval()(ids, use_cache=True).past_key_values
    with pytest.raises(UserError, match=r"^past_key_values belongs to a model of other layers"):
        create_model("pythia", **CHECK_SHAPE).eval()(ids, past_key_values=cache)


@pytest.mark.parametrize("name", TYPES)
def test_a_cache_goes_on_with_an_equal_model_but_not_with_other_rows(name):
    model, ids = create_model(name, **CHECK_SHAPE).eval(), torch.randint(61, (2, 5))
    twin = create_model(name, **CHECK_SHAPE).eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        cache = model(ids[:, :3], use_cache=True).past_key_values
        with pytest.raises(UserError, match=r"^past_key_values has read 2 rows: it cannot go on with 3$"):
            model(torch.randint(61, (3, 1)), past_key_values=cache)
        torch.testing.assert_close(twin(ids[:, 3:], past_key_values=cache).logits, model(ids).logits[:, 3:])


@pytest.mark.parametrize(
    ("shape", "seen", "said"),
    [
        ((2, 1, 7, 7), 0, "attention_mask is 2 × 1 × 7 × 7: it must be rows × tokens, here 2 × 7, 1 for real tokens"),
        ((2, 6), 0, "attention_mask is 2 × 6: it must be rows × tokens, here 2 × 7, 1 for real tokens"),
        ((1, 7), 0, "attention_mask is 1 × 7: it must be rows × tokens, here 2 × 7, 1 for real tokens"),
        ((2, 4), 3, "attention_mask is 2 × 4: .* here 2 × 7 or 2 × 10, 1 for real tokens"),
        ((), 0, "attention_mask is a single number: .*"),
    ],
)
@pytest.mark.parametrize("name", ["pythia", "infini"])
def test_a_mask_of_another_shape_is_refused_in_one_line(name, shape, seen, said):
    model, cache = create_model(name, **CHECK_SHAPE).eval(), None
    if seen:
        cache = model(torch.randint(61, (2, seen)), use_cache=True).past_key_values
    with pytest.raises(UserError, match=f"^{said}$"):
        model(torch.randint(61, (2, 7)), attention_mask=torch.ones(shape), past_key_values=cache)


def test_rows_that_are_one_in_memory_are_counted_once():
    model = create_model("infini_all", **CHECK_SHAPE, segment_length=4).eval()
    one, three = model.make_cache(), model.make_cache()
    with torch.no_grad():
        model(torch.randint(61, (1, 9)), update_memory=True)
        for cache, rows in ((one, 1), (three, 3)):
            for state, read in zip(cache.layers, model.make_cache().layers, strict=True):
                state.set_memory(read.memory())
            model(torch.randint(61, (rows, 1)), past_key_values=cache)
    memory = sum(t.nbytes for state in one.layers for t in state.memory().values())
    assert cache_bytes(one).used == cache_bytes(one).allocated == sum(model.state_bytes(1, 4))
    assert cache_bytes(three).used == 3 * (cache_bytes(one).used - memory) + memory
    assert cache_bytes(three).allocated == cache_bytes(three).used


@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name in TYPES for options in ({}, LAYER_TYPES[name].variants[0])]
)
def test_every_layer_type_keeps_the_whole_contract_with_a_quantised_cache(name, options, precision):
    """Any split gives the same logits, rows and padding stay apart, generate() = forward, bytes = closed form."""
    results = check_layer_types([name], cache_precision=precision, **options)[name]
    assert [result for result in results if result.passed is not True] == []


@pytest.mark.parametrize(("precision", "error"), [("model", 0.0), ("int8", 0.02), ("int4", 0.4)])
@pytest.mark.parametrize("name", TYPES)
def test_a_quantised_cache_changes_little(name, precision, error):
    model = create_model(name, **CHECK_SHAPE).double().eval()
    ids = torch.randint(61, (2, 30))
    with torch.no_grad():
        plain, read = model(ids).logits, model(ids, past_key_values=model.make_cache(precision)).logits
        torch.testing.assert_close(read, plain, rtol=0, atol=error * float(plain.std()) + 1e-12)
        assert torch.equal(model.token_losses(ids, "model"), model.token_losses(ids))


@pytest.mark.parametrize(
    ("model", "bf16", "int8", "int4"),
    [
        ("pythia", 12288, 6528, 3456),
        ("v_dproj", 9984, 5376, 2880),
        ("kv_dproj", 7680, 4224, 2304),
        ("gqa", 3072, 1632, 864),
        ("mla_256", 3072, 1632, 864),
        ("mla_rope", 1728, 924, 492),
        ("mqa", 1536, 816, 432),
        ("mla", 1536, 816, 432),
        ("mla_64", 768, 408, 216),
    ],
)
def test_bytes_of_a_token_at_the_shape_of_pythia_70m(model, bf16, int8, int4):
    lm = create_model(model, num_layers=1, vocab_size=64).bfloat16().eval()
    for precision, expected in {"model": bf16, "int8": int8, "int4": int4}.items():
        cache = lm.make_cache(precision)
        with torch.no_grad():
            lm(torch.randint(64, (1, 3)), past_key_values=cache)
        assert 6 * cache_bytes(cache).used == 3 * expected  # six layers like this one


def test_a_models_own_precision_is_made_saved_loaded_and_used(tmp_path):
    model = create_model("pythia:cache_precision=int8", **CHECK_SHAPE).eval()
    assert create_model("pythia", cache_precision="int8", **CHECK_SHAPE).config.cache_precision == "int8"
    model.save_pretrained(tmp_path)
    loaded, ids = load_model(tmp_path).eval(), torch.randint(61, (1, 9))
    made = loaded.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert made.past_key_values.layers[0].tensors()["keys.codes"].dtype == torch.int8
    with torch.no_grad():
        losses = loaded.token_losses(ids)
        assert torch.equal(losses, model.token_losses(ids, "int8"))
        assert not torch.equal(losses, model.token_losses(ids, "model"))


@pytest.mark.parametrize("precision", QUANTISED)
def test_a_model_with_a_quantised_cache_has_one_loss(precision):
    model, ids = create_model("pythia", cache_precision=precision, **CHECK_SHAPE).eval(), torch.randint(61, (2, 12))
    with torch.no_grad():
        losses = model.token_losses(ids)
        cached = model(ids, labels=ids, past_key_values=model.make_cache())
        for use_cache in (None, False, True):
            output = model(ids, labels=ids, use_cache=use_cache)
            assert torch.equal(output.logits, cached.logits)
            torch.testing.assert_close(output.loss, losses.mean())
            assert (output.past_key_values is not None) == bool(use_cache)
        full = model(ids, labels=ids, past_key_values=model.make_cache("model"))
        assert not torch.equal(full.logits, cached.logits)
        assert torch.equal(model.train()(ids, labels=ids).loss, full.loss)  # training is never quantised


def test_what_a_quantised_cache_refuses():
    with pytest.raises(UserError, match="unknown cache_precision 'int3': did you mean 'int8'"):
        create_model("pythia", cache_precision="int3")
    model = create_model("pythia", cache_precision="int4", **CHECK_SHAPE)
    with pytest.raises(UserError, match="unknown cache_precision 'fp8'"):
        model.make_cache("fp8")
    with pytest.raises(ValueError, match="passes no gradient"):
        model(torch.randint(61, (1, 4)), use_cache=True)
    with pytest.raises(ValueError, match="passes no gradient"):
        model.eval()(torch.randint(61, (1, 4)))
    with torch.no_grad():
        exported = model(torch.randint(61, (1, 4)), use_cache=True).past_key_values.export()
    with pytest.raises(ValueError, match="precision 'model' cannot hold keys"):
        model.make_cache("model").restore(exported)


@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize("name", ["pythia", "gqa", "v_dproj", "mla", "mla_rope", "infini_adapter"])
def test_a_token_is_decoded_from_codes_as_they_lie(name, precision, monkeypatch):
    if native.library() is None:
        pytest.skip("no C++ compiler here")
    model, ids = create_model(name, **CHECK_SHAPE, cache_precision=precision).eval(), torch.randint(61, (2, 9))
    with torch.no_grad():
        expected = model(ids).logits[:, 8:]
        cache = model(ids[:, :8], use_cache=True).past_key_values
        monkeypatch.setattr(Quantized, "numbers", lambda *_: pytest.fail("all codes of the cache were made numbers"))
        found = model(ids[:, 8:], past_key_values=cache).logits
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
