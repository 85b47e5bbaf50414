import itertools
import json
import math

import pytest
import torch
from torch import nn

from newllm.commands import evaluate as command
from newllm.data import prepare
from newllm.data.corpora import open_corpus
from newllm.data.recall import RecallTask
from newllm.errors import UserError
from newllm.evaluation.recall import accuracies, another_row, evaluate_recall, has_memories, knock_out, wilson
from newllm.experiments.compare import compare
from newllm.models import create_model
from newllm.models.cache import LMCache, RecurrentState
from newllm.resolution import resolve
from newllm.settings import DataSettings, ExperimentSettings, RunSettings

SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64}
SEGMENT = 32


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    plays = itertools.islice(open_corpus(DataSettings()).documents(), 4)
    (folder / "plays.txt").write_text("".join(play.text for play in plays))
    return {"data": str(folder / "plays.txt"), "cache_dir": str(folder / "cache"), "vocab_size": 1500}


@pytest.fixture(scope="module")
def data(text):
    return prepare(resolve(RunSettings(**text)))


def settings(**changes):
    recall = {"recall_segment": SEGMENT, "recall_distances": [4, 1], "recall_windows": 30}
    return resolve(RunSettings(**{"seq_length": 64, "precision": "float32", "eval_batch_size": 4} | recall | changes))


def model_of(data, name="pythia", **options):
    return create_model(name, vocab_size=len(data.tokenizer), **SHAPE, **options).eval()


class Oracle(nn.Module):
    """Answers with what followed the last four tokens when they occurred before; without its cache it cannot."""

    layers = ()
    head = nn.Identity()
    device = torch.device("cpu")

    def __init__(self, vocab_size, forgets=False):
        super().__init__()
        self.vocab_size, self.forgets = vocab_size, forgets

    def make_cache(self):
        return LMCache([RecurrentState()])

    def hidden_states(self, ids, past_key_values=None):
        every, seen = ids, 0
        if past_key_values is not None:
            before = past_key_values.layers[0].read("ids")
            every = ids if before is None or self.forgets else torch.cat([before, ids], dim=1)
            seen = every.shape[1] - ids.shape[1]
            past_key_values.layers[0].write(ids.shape[1], ids=every)
        scores = torch.zeros(*every.shape, self.vocab_size)
        for row, tokens in enumerate(every.tolist()):
            after = {}
            for place, token in enumerate(tokens):
                after[tuple(tokens[max(0, place - 4) : place])] = token
                if (context := tuple(tokens[max(0, place - 3) : place + 1])) in after:
                    scores[row, place, after[context]] = 1.0
        return scores[:, seen:]


def test_who_recalls_is_right_and_who_forgets_is_not(data):
    result = evaluate_recall(Oracle(len(data.tokenizer)), data, settings(recall_windows=100))
    assert [row["distance"] for row in result["distances"]] == [1, 4]
    for row in result["distances"]:
        assert row["accuracy"]["value"] == row["cached_accuracy"] == row["accuracy_among_told"]["value"] == 1
        assert 0.95 < row["accuracy"]["low"] < row["accuracy"]["high"] == 1
    forgetful = evaluate_recall(Oracle(len(data.tokenizer), forgets=True), data, settings(recall_windows=100))
    assert all(row["cached_accuracy"] < 0.2 for row in forgetful["distances"])


def test_an_untrained_model_guesses_and_its_cache_is_measured(data):
    values = settings()
    model = model_of(data)
    result = evaluate_recall(model, data, values)
    assert json.loads(json.dumps(result)) == result
    assert result["chance"] == 1 / result["answers"]
    assert result["chance_among_told"] == 1 / 2
    for row in result["distances"]:
        assert row["windows"] == 30
        assert row["cached_accuracy"] == row["accuracy"]["value"] < 0.25
        assert 0.2 < row["accuracy_among_told"]["value"] < 0.8
        assert math.log(row["answer_ppl"]) == pytest.approx(math.log(len(data.tokenizer)), abs=0.5)
        read = row["distance"] * SEGMENT
        assert row["state_bytes"] == sum(layer.state_bytes(read, 4) for layer in model.layers)
        assert row["beyond_training"] == (row["tokens"] > 64)
        assert "zeroed" not in row
    assert evaluate_recall(model, data, values) == result


def test_a_model_that_has_come_apart_is_measured_all_the_same(data):
    model = model_of(data)
    with torch.no_grad():
        model.head.weight *= 1e6
    assert evaluate_recall(model, data, settings())["distances"][0]["answer_ppl"] == math.inf


def test_the_example_is_a_window_in_pieces(data):
    pieces = evaluate_recall(model_of(data), data, settings())["example"]
    assert {kind for kind, _ in pieces} == {"text", "fact", "other fact", "question", "answer"}
    (fact,) = [text for kind, text in pieces if kind == "fact"]
    (answer,) = [text for kind, text in pieces if kind == "answer"]
    assert fact.endswith(f"{answer}.")
    window = RecallTask(data, settings()).evaluation_window(1, 0)
    assert "".join(text for _, text in pieces) == data.tokenizer.decode(window.ids.tolist())


@pytest.mark.parametrize("name", ["infini_all", "multi_memory", "hierarchical"])
def test_models_with_memories_are_knocked_out(data, name):
    model = model_of(data, name, segment_length=8)
    result = evaluate_recall(model, data, settings())
    for row in result["distances"]:
        assert row["cached_accuracy"] == row["accuracy"]["value"]
        for knocked_out in (row["zeroed"], row["swapped"]):
            assert set(knocked_out) == {"accuracy", "accuracy_among_told"}


def test_no_knock_out_without_memories_or_where_the_fact_is_still_pending(data):
    assert has_memories(model_of(data, "infini", segment_length=8), SEGMENT)
    assert not has_memories(model_of(data, "infini", segment_length=64), SEGMENT)
    assert not has_memories(model_of(data, "segment_local", segment_length=8), SEGMENT)
    assert not has_memories(model_of(data), SEGMENT)


def test_zeroed_is_as_if_nothing_was_read_and_swapped_as_if_another_text_was(data):
    model = model_of(data, "infini_all", segment_length=SEGMENT)
    windows = [RecallTask(data, settings()).evaluation_window(3, index) for index in range(4)]
    ids = torch.stack([torch.from_numpy(window.ids) for window in windows])
    cut = 3 * SEGMENT

    def after(name):
        cache = model.make_cache()
        model.hidden_states(ids[:, :cut], past_key_values=cache)
        knock_out(cache, name, windows)
        return model.hidden_states(ids[:, cut:], past_key_values=cache)

    with torch.no_grad():
        torch.testing.assert_close(after("zeroed"), model.hidden_states(ids[:, cut:]), atol=1e-4, rtol=1e-4)
        other = torch.cat([ids[another_row(windows), :cut], ids[:, cut:]], dim=1)
        torch.testing.assert_close(after("swapped"), model.hidden_states(other)[:, cut:], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(after("swapped"), after("zeroed"), atol=1e-3)


def test_memories_beside_attention_are_knocked_out_and_attention_is_not(data):
    model = model_of(data, "infini_adapter", segment_length=SEGMENT)
    windows = [RecallTask(data, settings()).evaluation_window(3, index) for index in range(4)]
    ids = torch.stack([torch.from_numpy(window.ids) for window in windows])
    cut = 3 * SEGMENT
    assert has_memories(model, SEGMENT)

    @torch.no_grad()
    def after(beta, *knock_outs):
        cache, gate = model.make_cache(), model.layers[0].beta
        gate.zero_()  # so that the layer above keeps nothing of what was read from the memory
        model.hidden_states(ids[:, :cut], past_key_values=cache)
        for name in knock_outs:
            knock_out(cache, name, windows)
        gate.fill_(beta)
        return model.hidden_states(ids[:, cut:], past_key_values=cache)

    silent, spoken, zeroed, swapped = after(0), after(1), after(1, "zeroed"), after(1, "swapped")
    torch.testing.assert_close(zeroed, silent, atol=1e-5, rtol=1e-5)
    for a, b in ((spoken, zeroed), (spoken, swapped), (zeroed, swapped)):
        assert not torch.allclose(a, b, atol=1e-3)


def test_the_other_row_has_another_answer(data):
    task = RecallTask(data, settings())
    windows = [task.evaluation_window(1, index) for index in (0, 0, 1, 2, 2)]
    source = another_row(windows).tolist()
    assert all(windows[a].told[0] != windows[b].told[0] for a, b in enumerate(source))


def test_of_answers_that_score_alike_one_in_as_many_is_the_right_one():
    """In bf16 that is no exception, and a model that knows nothing must be told by chance."""
    told = torch.tensor([[0, 1], [2, 0], [3, 1], [1, 0]])
    nothing = accuracies(torch.zeros(4, 5), told)
    assert (nothing["accuracy"]["value"], nothing["accuracy_among_told"]["value"]) == (1 / 5, 1 / 2)
    scores = torch.tensor([[2.0, 1, 0], [1, 1, 0], [0, 1, 1], [0, 1, 2]])[:, [0, 1, 2, 2, 2]]
    some = accuracies(scores, told)
    assert some["accuracy"]["value"] == pytest.approx((1 + 0 + 1 / 4 + 0) / 4)
    assert some["accuracy_among_told"]["value"] == pytest.approx((1 + 0 + 1 / 2 + 1) / 4)


def test_intervals_are_wilsons():
    assert wilson(0, 10) == pytest.approx({"value": 0, "low": 0, "high": 0.2775}, abs=1e-4)
    assert wilson(5, 10) == pytest.approx({"value": 0.5, "low": 0.2366, "high": 0.7634}, abs=1e-4)
    assert wilson(10, 10) == pytest.approx({"value": 1, "low": 0.7225, "high": 1}, abs=1e-4)


def test_what_cannot_be_asked_is_one_line(data):
    with pytest.raises(UserError, match="--recall-distances is"):
        evaluate_recall(model_of(data), data, settings(recall_distances=[0]))


def test_memories_of_a_single_window_cannot_be_swapped(data):
    with pytest.raises(UserError, match="--recall-windows is 1: it must be at least 2"):
        settings(recall_windows=1)


def test_a_comparison_that_could_not_be_measured_trains_nothing(text, tmp_path):
    values = {"models": ["pythia"], "seq_length": 64, "recall_share": 0.5, "recall_segment": SEGMENT, "jobs": 1}
    comparison = ExperimentSettings(**text | SHAPE | values, recall_distances=[10_000], out=str(tmp_path / "out"))
    with pytest.raises(UserError, match="a distance of 10000 takes"):
        compare(comparison)
    assert not list((tmp_path / "out").iterdir())


def test_newllm_evaluate_measures_recall_of_any_model_folder(data, text, tmp_path, capsys):
    model = model_of(data)
    model.save_pretrained(tmp_path)
    data.tokenizer.save_pretrained(tmp_path)
    results = command.evaluate(tmp_path, ["recall"], settings(**text))
    command.print_results(results)
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1])["recall_across_segments"] == results["recall_across_segments"]
    assert "test" not in results
    table = next(i for i, line in enumerate(printed) if "segments later" in line)
    assert [line.split()[0] for line in printed[table + 1 : table + 3]] == ["1", "4"]
