"""A memory that is read into, held, moved, merged, frozen, saved: what it does to the model, and what is refused."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from newllm import create_model, load_model
from newllm.errors import UserError
from newllm.models import ContinuousLM, TransformerLM
from newllm.models.layers import HierarchicalLayer, InfiniLayer, MultiMemoryLayer
from newllm.models.memory import merge_memory_states, take_row
from newllm.models.memory_file import _digest, fingerprint, load_memory, read_memory, save_memory

S = 4  # segment length
PRESETS = ("infini", "multi_memory", "hierarchical", "infini_all", "infini_adapter")


def make(preset: str = "infini", *, seed: int = 0, layers: int = 2, **options) -> TransformerLM:
    """A small model with large weights, so that a memory shows in its logits."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "num_layers": layers, "num_heads": 2, "intermediate_size": 16, "vocab_size": 40}
    model = create_model(preset, **shape, segment_length=S, initializer_range=0.3, **options).eval()
    for layer in model.layers if preset == "infini_adapter" else ():
        for gate in layer.gate_parameters():  # closed at first
            torch.nn.init.ones_(gate)
    return model


def text(length: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(40, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: TransformerLM, ids: torch.Tensor, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **inputs).logits


def after_reading(preset: str = "infini", length: int = 10, rows: int = 1, **options) -> TransformerLM:
    model = make(preset, **options)
    logits(model, text(length, rows), update_memory=True)
    return model


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@given(
    cls=st.sampled_from([InfiniLayer, MultiMemoryLayer, HierarchicalLayer]),
    delta=st.booleans(),
    key_shift=st.booleans(),
    segments=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    last=st.integers(1, 3 * S),
)
def test_reading_in_several_calls_is_reading_in_one(cls, delta, key_shift, segments, last):
    """For a layer that knows nothing of other segments but its memory, cut between segments."""
    torch.manual_seed(0)
    layer = cls(16, 2, 16, segment_length=S, use_delta_rule=delta, key_shift=key_shift)
    model = TransformerLM(layers=[layer], vocab_size=40, initializer_range=0.3).eval().double()
    ids = text(sum(segments) * S + last, rows=2)
    expected = logits(model, ids)[:, -last:]
    *chunks, rest = ids.split([count * S for count in segments] + [last], dim=1)
    for chunk in chunks:
        logits(model, chunk, update_memory=True)
    torch.testing.assert_close(logits(model, rest), expected)
    logits(model, rest, update_memory=True)
    state = model.get_memory_state()
    model.reset_memory()
    logits(model, ids, update_memory=True)
    torch.testing.assert_close(state, model.get_memory_state())


def test_with_shifted_keys_the_first_token_is_not_written_and_the_last_key_is_kept():
    model = make(key_shift=True, use_delta_rule=False).double()
    layer, ids = model.layers[0], text(2 * S, rows=2)
    logits(model, ids, update_memory=True)
    with torch.no_grad():
        _, k, v = layer.qkv(layer.norm_attention(model.embed(ids))).chunk(3, dim=-1)
    features = k.clamp(max=0).exp() + k.clamp(min=0)
    state = model.get_memory_state()
    torch.testing.assert_close(state["0.matrix"][:, 0, 0], features[:, :-1].transpose(1, 2) @ v[:, 1:])
    torch.testing.assert_close(state["0.normaliser"][:, 0, 0], features[:, :-1].sum(dim=1))
    torch.testing.assert_close(state["0.before"][:, 0], features[:, -1])


@pytest.mark.parametrize("preset", PRESETS)
def test_an_incomplete_segment_is_part_of_what_was_read(preset):
    model = after_reading(preset, length=2 * S)
    before = model.get_memory_state()
    logits(model, text(S - 1, seed=1), update_memory=True)
    state = model.get_memory_state()
    assert int(state["0.written"]) == 3
    assert not torch.equal(state["0.matrix"], before["0.matrix"])


@pytest.mark.parametrize("preset", PRESETS)
def test_the_memory_is_read_until_it_is_reset(preset):
    model, ids = make(preset), text(7, rows=2, seed=1)
    without = logits(model, ids)
    logits(model, text(10), update_memory=True)
    assert (logits(model, ids) - without).abs().max() > 1e-3
    model.reset_memory()
    assert torch.equal(logits(model, ids), without)
    assert model.get_memory_state() == {}


def test_logits_losses_cache_and_generation_read_the_same_memory():
    model, ids = after_reading(), text(6, seed=1)
    expected = logits(model, ids)
    torch.testing.assert_close(logits(model, ids, use_cache=True), expected)
    losses = -expected[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(model.token_losses(ids)[0], losses)
    torch.testing.assert_close(model.token_losses(ids, "model")[0], losses)
    written = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(written[0, 6:], logits(model, written)[0, 5:-1].argmax(-1))
    model.reset_memory()
    assert not torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0), written)


def test_reading_alone_changes_no_memory():
    model = after_reading()
    before = model.get_memory_state()
    model.generate(text(6), max_new_tokens=8, do_sample=False, pad_token_id=0)
    logits(model, text(9), use_cache=True)
    assert same(model.get_memory_state(), before)


def test_a_state_is_a_copy():
    model = after_reading()
    before = model.get_memory_state()
    model.get_memory_state()["0.matrix"].zero_()
    assert same(model.get_memory_state(), before)
    given_state = {name: tensor.clone() for name, tensor in before.items()}
    model.set_memory_state(given_state)
    given_state["0.matrix"].zero_()
    assert same(model.get_memory_state(), before)


@pytest.mark.parametrize("preset", PRESETS)
def test_another_model_object_continues_bit_for_bit(preset):
    model, other, ids = after_reading(preset), make(preset), text(7, rows=3, seed=1)
    other.set_memory_state(model.get_memory_state())
    assert torch.equal(logits(other, ids), logits(model, ids))


def test_training_neither_reads_nor_writes_it():
    fresh, model, ids = make("infini_all").train(), after_reading("infini_all").train(), text(12, rows=2)
    before = model.get_memory_state()
    losses = [m(ids, labels=ids).loss for m in (fresh, model)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))
    assert model.make_cache().layers[0].memory() == {}
    assert same(model.get_memory_state(), before)
    with pytest.raises(UserError, match="training mode"):
        model(ids, update_memory=True)


def test_it_is_no_part_of_a_saved_model(tmp_path):
    model = after_reading()
    assert model.state_dict().keys() == make().state_dict().keys()
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).get_memory_state() == {}


def test_no_gradient_goes_into_the_memory():
    model = after_reading()
    model(text(10, seed=1), update_memory=True)
    assert not any(tensor.requires_grad for tensor in model.get_memory_state().values())


@pytest.mark.parametrize("preset", PRESETS)
def test_one_row_serves_any_batch(preset):
    model, ids = after_reading(preset), text(7, rows=3, seed=1)
    together = logits(model, ids)
    for b in range(3):
        torch.testing.assert_close(together[b : b + 1], logits(model, ids[b : b + 1]))


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_read_side_by_side_have_memories_of_their_own(preset):
    model, ids = after_reading(preset, rows=3), text(7, rows=3, seed=1)
    state, together = model.get_memory_state(), logits(model, ids)
    for b in range(3):
        alone = make(preset)
        logits(alone, text(10, rows=3)[b : b + 1], update_memory=True)
        torch.testing.assert_close(alone.get_memory_state(), take_row(state, b))
        torch.testing.assert_close(logits(alone, ids[b : b + 1]), together[b : b + 1])
    with pytest.raises(ValueError, match="3 rows"):
        logits(model, text(7, rows=2))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_cache_that_has_only_the_memory_changes_its_rows_as_any_other(preset):
    model, ids = after_reading(preset), text(7, rows=3, seed=1)
    without, expected = logits(make(preset), ids), logits(model, ids)
    for change in (
        lambda cache: cache.batch_repeat_interleave(3),
        lambda cache: cache.reorder_cache(torch.tensor([0, 0, 0])),
        lambda cache: cache.detach_(),
        lambda cache: cache.restore(cache.export()),
    ):
        cache = model.make_cache()
        change(cache)
        torch.testing.assert_close(logits(model, ids, past_key_values=cache), expected)
    cache = model.make_cache()
    cache.reset_rows(torch.tensor([False, True, False]))
    found = logits(model, ids, past_key_values=cache)
    torch.testing.assert_close(found[::2], expected[::2])
    torch.testing.assert_close(found[1], without[1])


@pytest.mark.parametrize(("before", "after"), [(torch.float32, torch.float64), (torch.float64, torch.bfloat16)])
def test_a_model_that_changes_its_dtype_keeps_its_memory(before, after):
    model, ids = make().to(before), text(7, seed=1)
    without = logits(model, ids)
    logits(model, text(10), update_memory=True)
    expected = logits(model, ids)
    found = logits(model.to(after), ids)
    assert found.dtype == after
    assert (found - expected).abs().max() < 0.3 * (expected - without).abs().max()


DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@pytest.mark.parametrize("key_shift", [False, True])
@pytest.mark.parametrize("after", DTYPES)
@pytest.mark.parametrize("before", DTYPES)
def test_what_a_model_gives_it_takes_back_whatever_its_dtype_was(before, after, key_shift, tmp_path):
    model = make(key_shift=key_shift).to(before)
    logits(model, text(10), update_memory=True)
    expected = logits(model.to(after), text(7, seed=1))
    state = model.get_memory_state()
    save_memory(model, tmp_path / "a.memory", tokens_read=10)
    for bring in (lambda: model.set_memory_state(state), lambda: load_memory(model, tmp_path / "a.memory")):
        model.reset_memory()
        bring()
        assert same(model.get_memory_state(), state)
        assert torch.equal(logits(model, text(7, seed=1)), expected)


def test_what_is_read_in_inference_mode_is_of_use_outside():
    model = make(key_shift=True)
    with torch.inference_mode():
        model(text(10), update_memory=True)
    assert model(text(7, seed=1)).logits.requires_grad
    logits(model, text(7, seed=1), update_memory=True)


def test_a_cache_that_is_reset_forgets_the_memory_too():
    model, ids = after_reading(key_shift=True), text(7, seed=1)
    with_memory, without = logits(model, ids), logits(make(key_shift=True), ids)
    for reset in (lambda cache: cache.reset(), lambda cache: cache.reset_rows(torch.tensor([True]))):
        cache = model.make_cache()
        logits(model, text(3), past_key_values=cache)
        reset(cache)
        positions = torch.arange(7)[None]
        torch.testing.assert_close(logits(model, ids, past_key_values=cache, position_ids=positions), without)
    torch.testing.assert_close(logits(model, ids, past_key_values=model.make_cache()), with_memory)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_read(side):
    model = make("infini_all")
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, slice(0, 3) if side == "left" else slice(7, None)] = 0
    ids = text(10, rows=2)
    logits(model, ids, attention_mask=mask, update_memory=True)
    state = model.get_memory_state()
    model.reset_memory()
    logits(model, ids[1:, mask[1].bool()], update_memory=True)
    torch.testing.assert_close(model.get_memory_state(), take_row(state, 1))


def test_the_memory_has_the_size_of_the_closed_form():
    model = after_reading("multi_memory", rows=2, memory_head_dim=8)
    (layer,) = model.memory_layers().values()
    sizes = {name: tensor.nbytes for name, tensor in model.get_memory_state().items()}
    assert sizes.pop("0.written") == 2 * 8
    assert sum(sizes.values()) == 2 * layer.memory_bytes() == 2 * 4 * 2 * (8 * 8 + 8) * 4


def test_updating_needs_a_memory_and_no_other_cache():
    with pytest.raises(UserError, match=r"no memory layer; presets that have one: .*infini") as error:
        make("segment_local")(text(5), update_memory=True)
    assert {"hierarchical", "infini_all", "multi_memory"} <= set(re.findall(r"\w+", str(error.value)))
    assert "segment_local" not in str(error.value)
    for call in (lambda m: m.get_memory_state(), lambda m: m.reset_memory(), lambda m: m.freeze_memory([0])):
        with pytest.raises(UserError, match="no memory layer"):
            call(create_model("pythia", hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16, vocab_size=40))
    model = make()
    with pytest.raises(UserError, match="past_key_values"):
        model(text(5), past_key_values=model.make_cache(), update_memory=True)


WRONG_STATES = {
    "missing": (lambda s: s.pop("0.normaliser"), "'0.normaliser' is missing"),
    "unknown": (lambda s: s.update({"5.matrix": s["0.matrix"]}), "'5.matrix' is unknown here; .* are 0"),
    "shape": (lambda s: s.update({"0.matrix": s["0.matrix"][..., :8]}), "1 × 1 × 1 × 16 × 8 float32, .* 16 × 16"),
    "rows": (lambda s: s.update({"0.matrix": s["0.matrix"].expand(2, -1, -1, -1, -1)}), "'0.matrix' is 2 × 1"),
    "dtype": (lambda s: s.update({"0.matrix": s["0.matrix"].double()}), "float64, here it would be .* float32"),
    "NaN": (lambda s: s["0.matrix"][0, 0, 0, 3].fill_(torch.nan), "'0.matrix' holds numbers that are not finite"),
    "infinite": (lambda s: s["0.normaliser"].fill_(torch.inf), "'0.normaliser' holds numbers that are not finite"),
    "frozen": (lambda s: s.update({"0.frozen": torch.tensor([1])}), "no memory 1 to freeze: layer 0 has 1"),
    "frozen, nested": (lambda s: s.update({"0.frozen": torch.tensor([[0]])}), "'0.frozen' is 1 × 1 int64, .* a list"),
    "frozen, one number": (lambda s: s.update({"0.frozen": torch.tensor(0)}), "'0.frozen' is a single int64"),
    "negative": (lambda s: s["0.normaliser"].neg_(), "'0.normaliser' holds numbers below 0"),
    "below 0": (lambda s: s["0.written"].fill_(-1), "'0.written' holds numbers below 0"),
    "beyond all": (lambda s: s["0.written"].fill_(2**63 - 1), "'0.written' is more than 1,000,000,000,000,000 segm"),
    "count": (lambda s: s.update({"0.written": s["0.written"][0]}), "'0.written' is a single int64, .* 1 int64"),
    "no rows": (lambda s: s.update({name: tensor[:0] for name, tensor in s.items()}), "is 0 × 1 .* would be 1 × 1"),
}


@pytest.mark.parametrize("wrong", WRONG_STATES)
def test_a_state_that_does_not_fit_changes_nothing(wrong):
    damage, message = WRONG_STATES[wrong]
    model, state = after_reading(), after_reading(length=7).get_memory_state()
    before = model.get_memory_state()
    damage(state)
    with pytest.raises(UserError, match=message):
        model.set_memory_state(state)
    assert same(model.get_memory_state(), before)


@pytest.mark.parametrize(
    ("preset", "options"),
    [("infini", {"num_memory_banks": 3, "segments_per_bank": 1}), ("multi_memory", {"num_memories": 3})],
)
def test_frozen_memories_are_read_and_not_written(preset, options):
    model = after_reading(preset, length=3 * S, **options)
    before = model.get_memory_state()
    model.freeze_memory([1])
    logits(model, text(3 * S, seed=1), update_memory=True)
    state = model.get_memory_state()
    changed = [not torch.equal(a, b) for a, b in zip(state["0.matrix"][0], before["0.matrix"][0], strict=True)]
    assert changed == [True, False, True]
    assert state["0.frozen"].tolist() == [1]

    other = make(preset, **options)
    other.set_memory_state(state)
    assert torch.equal(logits(other, text(6)), logits(model, text(6)))
    other.unfreeze_memory()
    logits(other, text(3 * S, seed=2), update_memory=True)
    assert not torch.equal(other.get_memory_state()["0.matrix"][0, 1], before["0.matrix"][0, 1])
    with pytest.raises(UserError, match="no memory 3 to freeze: layer 0 has 3"):
        model.freeze_memory([0, 3])
    assert model.get_memory_state()["0.frozen"].tolist() == [1]


def test_what_is_not_written_is_not_counted(tmp_path):
    """Neither while all is frozen nor where all is padding: whose turn it is does not change."""
    options = {"num_memory_banks": 2, "segments_per_bank": 2, "key_shift": True}
    model = make(**options)
    logits(model, text(S), update_memory=True)
    model.freeze_memory([0, 1])
    before = model.get_memory_state()
    logits(model, text(3 * S + 1, seed=1), update_memory=True)  # at once, and the rest as where a text ends
    cache = model.make_cache()
    for token in text(2 * S, seed=2).split(1, dim=1):
        logits(model, token, past_key_values=cache)
    model.unfreeze_memory()
    state, last = model.get_memory_state(), cache.layers[0].memory()
    for name in ("matrix", "normaliser", "written"):
        assert torch.equal(state[f"0.{name}"], before[f"0.{name}"])
        assert torch.equal(last[name], before[f"0.{name}"])
    assert not torch.equal(state["0.before"], before["0.before"])  # what came before the next token
    logits(model, text(S), update_memory=True)
    assert model.get_memory_state()["0.normaliser"][0].flatten(1).any(dim=1).tolist() == [True, False]

    for model, inputs in (
        (make(**options), {"attention_mask": torch.zeros(1, 9)}),
        (make(**options), {"attention_mask": None}),
    ):
        if inputs["attention_mask"] is None:
            model.freeze_memory([0, 1])
        logits(model, text(9), update_memory=True, **inputs)
        assert model.get_memory_state()["0.written"].tolist() == [0]
        with pytest.raises(UserError, match="the memory is empty"):
            save_memory(model, tmp_path / "a.memory", tokens_read=9)


def test_freezing_directs_what_is_read_to_the_other_memories():
    model = make("multi_memory", num_memories=3)
    model.freeze_memory([0, 2])
    logits(model, text(3 * S), update_memory=True)
    written = model.get_memory_state()["0.normaliser"][0].flatten(1).any(dim=1)
    assert written.tolist() == [False, True, False]
    model.unfreeze_memory([2])
    assert model.get_memory_state()["0.frozen"].tolist() == [0]
    model.reset_memory()
    assert model.get_memory_state() == {}


def test_merged_memories_are_those_of_one_text_after_the_other():
    model = make(use_delta_rule=False)
    documents = text(3 * S, rows=4)
    logits(model, documents, update_memory=True)
    side_by_side = model.get_memory_state()
    model.reset_memory()
    for document in documents:
        logits(model, document[None], update_memory=True)
    one_by_one = model.get_memory_state()
    torch.testing.assert_close(merge_memory_states(model, [side_by_side]), one_by_one)
    rows = [take_row(side_by_side, b) for b in range(4)]
    torch.testing.assert_close(merge_memory_states(model, rows), one_by_one)
    model.set_memory_state(merge_memory_states(model, rows))


def test_merged_memories_with_shifted_keys_begin_anew():
    model = make(use_delta_rule=False, key_shift=True)
    logits(model, text(2 * S, rows=3), update_memory=True)
    state = model.get_memory_state()
    merged = merge_memory_states(model, [state])
    torch.testing.assert_close(merged["0.matrix"], state["0.matrix"].sum(dim=0, keepdim=True))
    assert not merged["0.before"].any()
    model.set_memory_state(merged)
    del merged["0.before"]
    with pytest.raises(UserError, match=r"'0\.before' is missing"):
        model.set_memory_state(merged)


def test_merging_is_refused_where_it_is_not_exact():
    model = after_reading()
    with pytest.raises(UserError, match=r"layer 0 writes by the delta rule.*do not add up"):
        merge_memory_states(model, [model.get_memory_state()] * 2)
    model = after_reading("multi_memory", use_delta_rule=False)
    with pytest.raises(UserError, match="none that is empty"):
        merge_memory_states(model, [model.get_memory_state(), {}])
    model.freeze_memory([0])
    with pytest.raises(UserError, match="counted more than once"):
        merge_memory_states(model, [model.get_memory_state()] * 2)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_file_brings_the_memory_back(preset, tmp_path):
    model, other = after_reading(preset), make(preset)
    model.freeze_memory([0])
    saved = save_memory(model, tmp_path / "a.memory", tokens_read=10, sources=["a.txt"])
    assert load_memory(other, tmp_path / "a.memory") == saved
    assert same(other.get_memory_state(), model.get_memory_state())
    assert (saved.tokens_read, saved.sources, saved.layers[0]["written"]) == (10, ["a.txt"], [3])
    assert saved.bytes == sum(t.nbytes for name, t in model.get_memory_state().items() if "frozen" not in name)
    assert [path.name for path in tmp_path.iterdir()] == ["a.memory"]


@pytest.fixture(scope="module")
def memory_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "a.memory"
    save_memory(after_reading(), path, tokens_read=10)
    return path


def refused(path: Path, message: str, model: TransformerLM | None = None) -> None:
    """Loading says what is wrong in one line, and leaves the memory as it was."""
    if model is None:
        model = after_reading(length=5)
    before = model.get_memory_state()
    with pytest.raises(UserError, match=message) as error:
        load_memory(model, path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert same(model.get_memory_state(), before)


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(share, memory_file):
    whole = memory_file.read_bytes()
    cut = memory_file.with_name("cut.memory")
    cut.write_bytes(whole[: int(share * len(whole))])
    refused(cut, "truncated")


@given(share=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255))
def test_a_file_with_another_byte_anywhere_is_refused(share, change, memory_file):
    content = bytearray(memory_file.read_bytes())
    content[int(share * len(content))] ^= change
    changed = memory_file.with_name("changed.memory")
    changed.write_bytes(content)
    refused(changed, "memory")


def test_a_changed_header_is_refused(memory_file):
    path = memory_file.with_name("header.memory")
    _, state = read_memory(memory_file)
    save_file(state, path, {"format": "newllm-memory", "format_version": "1", "tokens_read": "99", "sha256": "0"})
    refused(path, "does not match its checksum")
    save_file(state, path, {"format": "newllm-memory", "format_version": "7"})
    refused(path, "memory format 7; newllm .* reads 1")


FORGERIES = {
    "a field missing": (lambda h: h.pop("about"), "'about' is missing"),
    "a field too many": (lambda h: h.update(extra="1"), "'extra' is unknown"),
    "no JSON": (lambda h: h.update(tokens_read="x"), "Expecting value"),
    "a number as text": (lambda h: h.update(tokens_read='"10"'), "'tokens_read' is \"10\""),
    "a truth as number": (lambda h: h.update(tokens_read="true"), "'tokens_read' is true"),
    "fewer than none": (lambda h: h.update(tokens_read="-1"), "'tokens_read'"),
    "nested deeply": (lambda h: h.update(sources="[" * 100_000), "built otherwise"),
    "no names": (lambda h: h.update(sources="[1]"), "'sources'"),
    "no layers": (lambda h: h.update(layers="[]"), "'layers' are not those"),
    "no list": (lambda h: h.update(layers="{}"), "'layers' is {}"),
    "an empty layer": (lambda h: h.update(layers="[{}]"), "built otherwise"),
    "no layer": (lambda h: h.update(layers="[1]"), "built otherwise"),
    "another layer": (lambda h: h.update(layers=h["layers"].replace('"index": 0', '"index": 1')), "otherwise"),
    "other counts": (lambda h: h.update(layers=h["layers"].replace('"written": [3]', '"written": [4]')), "'layers'"),
    "other bytes": (lambda h: h.update(layers=h["layers"].replace('"bytes": ', '"bytes": 1')), "'layers' are not"),
    "twice": (lambda h: h.update(layers=json.dumps(json.loads(h["layers"]) * 2)), "'layers' are not those"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_header_with_a_right_checksum_and_odd_fields_is_refused(forgery, memory_file):
    forge, message = FORGERIES[forgery]
    path = memory_file.with_name("forged.memory")
    with safe_open(memory_file, "pt") as opened:
        header, state = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    del header["sha256"]
    forge(header)
    save_file(state, path, header | {"sha256": _digest(header, state)})
    refused(path, f"a memory file with a header that newllm does not write: .*{message}")


@pytest.mark.parametrize("shape", [(), (3,), (1, 16, 16), (2, 1, 1, 16, 16)])
def test_tensors_that_are_no_memory_are_refused_with_a_right_checksum(shape, memory_file):
    path = memory_file.with_name("forged.memory")
    with safe_open(memory_file, "pt") as opened:
        header, state = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    del header["sha256"]
    for name, tensor in (("0.matrix", torch.ones(shape)), ("0.written", torch.ones(shape, dtype=torch.bool))):
        odd = state | {name: tensor}
        save_file(odd, path, header | {"sha256": _digest(header, odd)})
        refused(path, "a memory file with a header|here it would be" if name == "0.matrix" else "memory")


def test_other_files_are_refused(memory_file, tmp_path):
    refused(tmp_path / "none.memory", "no such memory file")
    refused(tmp_path, "no such memory file")
    (tmp_path / "text.memory").write_text("To be, or not to be, that is the question.")
    refused(tmp_path / "text.memory", "not a memory file")
    save_file(load_file(memory_file), tmp_path / "weights.safetensors")
    refused(tmp_path / "weights.safetensors", "no memory written by newllm")


def test_the_memory_of_another_model_is_refused(memory_file):
    for other in (make(seed=1), make("multi_memory"), make(use_delta_rule=False), make().double()):
        logits(other, text(5), update_memory=True)
        refused(
            memory_file, r"belongs to model [0-9a-f]{12} \(infini, pythia; .*the model given is [0-9a-f]{12}", other
        )


def test_the_same_weights_in_another_mode_are_another_model():
    state = {"mode": "continuous", "input": "fuse", "layers": [InfiniLayer(16, 2, 16, segment_length=4)]}
    models = [ContinuousLM(**state, vocab_size=31, feedback=kind) for kind in ("state", "word")]
    models[1].load_state_dict(models[0].state_dict())
    before = fingerprint(models[0])
    assert fingerprint(models[1]) != before
    models[0].config.eos_token_id = 1  # where a text ends is no part of what is read
    assert fingerprint(models[0]) == before


def test_a_memory_that_is_not_finite_is_refused(tmp_path):
    model = after_reading()
    model._memory["0.matrix"].fill_(torch.nan)
    save_memory(model, tmp_path / "a.memory", tokens_read=1)
    refused(tmp_path / "a.memory", "not finite")


def test_an_empty_memory_is_not_saved(tmp_path):
    with pytest.raises(UserError, match="empty"):
        save_memory(make(), tmp_path / "a.memory", tokens_read=0)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.memory"
    save_memory(after_reading(), path, tokens_read=1)
    before = path.read_bytes()

    def full(self, content):
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"a\.memory: the memory cannot be written: No space left on device"):
        save_memory(after_reading(length=20), path, tokens_read=2)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.memory"]


OTHER_PROCESS = """
import sys, torch
from newllm import load_model
from newllm.models.memory_file import load_memory
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
folder = sys.argv[1]
model = load_model(f"{folder}/model").eval()
load_memory(model, f"{folder}/book.memory")
with torch.no_grad():
    logits = model(load_file(f"{folder}/prompt.safetensors")["ids"]).logits
save_file({"logits": logits}, f"{folder}/logits.safetensors")
"""


def test_a_memory_absorbed_in_one_process_gives_the_same_bits_in_another(tmp_path):
    model, prompt = make("infini_all"), text(9, rows=2, seed=1)
    without = logits(model, prompt)
    logits(model, text(50), update_memory=True)
    model.save_pretrained(tmp_path / "model")
    save_memory(model, tmp_path / "book.memory", tokens_read=50)
    save_file({"ids": prompt}, tmp_path / "prompt.safetensors")
    process = subprocess.run([sys.executable, "-c", OTHER_PROCESS, str(tmp_path)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    loaded = load_file(tmp_path / "logits.safetensors")["logits"]
    assert torch.equal(loaded, logits(model, prompt))
    assert (loaded - without).abs().max() > 1e-3


def test_the_header_is_readable_without_the_library(memory_file):
    length = int.from_bytes(memory_file.read_bytes()[:8], "little")
    header = json.loads(memory_file.read_bytes()[8 : 8 + length])["__metadata__"]
    assert json.loads(header["tokens_read"]) == 10
    assert json.loads(header["layers"])[0]["type"] == "infini"
