import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from newllm.commands import evaluate as command
from newllm.data import prepare
from newllm.data.corpora import open_corpus
from newllm.data.reversal import GROUPS, Kind, ReversalTask, load_kinds, of_group
from newllm.evaluation.reversal import (
    Answers,
    answer_scores,
    blocks_of,
    evaluate_reversal,
    group_figures,
    mean_auc,
    permutation_p,
    questions,
    shares_below,
)
from newllm.experiments.compare import compare
from newllm.experiments.results import read_results
from newllm.models import create_model
from newllm.models.cache import LMCache, RecurrentState
from newllm.models.transformer import TransformerLM
from newllm.resolution import resolve
from newllm.settings import DataSettings, ExperimentSettings, RunSettings

SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64}
SIZES = {"forward": 8, "both": 4, "never": 4}
ALL_KINDS = load_kinds()


def few(kind: Kind) -> Kind:
    pairs = [pair for group, size in SIZES.items() for pair in of_group(kind, group)[:size]]
    return Kind(kind.name, kind.fictitious, kind.templates, pairs)


@pytest.fixture(autouse=True)
def few_facts(monkeypatch):
    monkeypatch.setattr("newllm.data.reversal.load_kinds", lambda: [few(ALL_KINDS[0]), few(ALL_KINDS[5])])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    plays = itertools.islice(open_corpus(DataSettings()).documents(), 3)
    (folder / "plays.txt").write_text("".join(play.text[:100_000] for play in plays))
    return {"data": str(folder / "plays.txt"), "cache_dir": str(folder / "cache"), "vocab_size": 800}


@pytest.fixture(scope="module")
def data(text):
    return prepare(resolve(RunSettings(**text)))


def settings(**changes):
    return resolve(RunSettings(**{"seq_length": 64, "precision": "float32", "eval_batch_size": 64} | changes))


def model_of(data, name="pythia", **options):
    return create_model(name, vocab_size=len(data.tokenizer), **SHAPE, **options).eval()


class Parrot(nn.Module):
    """Goes on as the sentences do that it was told; after anything else every token is as likely."""

    training = False
    device = torch.device("cpu")
    without_memory = TransformerLM.without_memory
    layers = ()
    _memory = None

    def __init__(self, vocab_size, told):
        super().__init__()
        self.head = nn.Linear(vocab_size, vocab_size, bias=False)
        nn.init.eye_(self.head.weight)
        self.follows = {tuple(ids[:end]): ids[end] for ids in told for end in range(len(ids))}

    def make_cache(self):
        return LMCache([RecurrentState()])

    def hidden_states(self, ids, past_key_values=None):
        every, seen = ids, 0
        if past_key_values is not None:
            before = past_key_values.layers[0].read("ids")
            every = ids if before is None else torch.cat([before, ids], dim=1)
            seen = every.shape[1] - ids.shape[1]
            past_key_values.layers[0].write(ids.shape[1], ids=every)
        scores = torch.zeros(*every.shape, self.head.in_features)
        for row, tokens in enumerate(every.tolist()):
            for place in range(len(tokens)):  # the first token is EOS
                if (after := self.follows.get(tuple(tokens[1 : place + 1]))) is not None:
                    scores[row, place, after] = 30.0
        return scores[:, seen:]


def test_who_learns_by_heart_shows_the_curse_between_ceiling_and_floor(data):
    told = ReversalTask(data).training_sentences("forward")
    result = evaluate_reversal(Parrot(len(data.tokenizer), told), data, settings())
    groups = result["groups"]
    assert {group: groups[group]["pairs"] for group in GROUPS} == {g: 2 * size for g, size in SIZES.items()}
    assert result["told"]
    for group, direction in (("forward", "forward"), ("both", "forward"), ("both", "backward")):
        figures = groups[group][direction]
        assert figures["auc"]["value"] == figures["first"]["value"] == figures["exact"]["value"] == 1
        assert figures["first_pool"]["value"] == figures["mean_rank_pool"] == 1
        assert figures["p"] < 0.01
        assert figures["answer_ppl"] == pytest.approx(1, abs=0.01)
    for group, direction in (("forward", "backward"), ("never", "forward"), ("never", "backward")):
        figures = groups[group][direction]
        assert figures["auc"]["value"] == pytest.approx(0.5, abs=1e-9), (
            "likeliness alone, here of short answers, is 0.5"
        )
        assert figures["p"] == 1
        assert figures["exact"]["value"] == 0
        assert figures["answer_ppl"] == pytest.approx(len(data.tokenizer), rel=0.01)
    assert groups["forward"]["backward"]["chance"] == 1 / SIZES["forward"]
    assert result["forward_ppl"] < result["backward_ppl"]
    assert result["ratio"] == pytest.approx(result["forward_ppl"] / result["backward_ppl"])
    assert result["gap"] == pytest.approx(result["backward_ppl"] - result["forward_ppl"])
    assert [row["forward_exact"] for row in result["by_kind"]] == [1, 1]
    assert [row["backward_auc"] for row in result["by_kind"]] == pytest.approx([0.5, 0.5])


def test_names_told_more_often_do_not_look_like_recall(data):
    """Likely after every question because they were told: an advantage among all of the kind, none within the group."""
    asked = questions(ReversalTask(data), "backward")
    likely = np.array([{"forward": 1.0, "both": 5.0, "never": -5.0}[question.pair.group] for question in asked])
    noise = np.random.default_rng(0).normal(size=(len(asked), len(asked))) / 10
    answers = Answers(asked, likely + noise, [np.ones(len(q.sentence.ids)) for q in asked], np.zeros(len(asked), bool))
    aucs = {}
    for group in GROUPS:
        figures = group_figures(answers, blocks_of(asked, group))
        assert figures["auc"]["low"] < 0.5 < figures["auc"]["high"]
        assert figures["p"] > 0.05
        aucs[group] = figures["auc_kind"]
    assert aucs["never"] < 0.2
    assert aucs["both"] > 0.8


@pytest.mark.parametrize(("popularity", "signal"), [(0, 0), (3, 0), (1, 1), (3, 3)])
def test_the_interval_of_an_auc_covers_what_pairs_drawn_anew_give_and_is_no_wider(popularity, signal):
    """Answers that are likely after every question make no AUC uncertain: they win as often as they make lose."""
    rng = np.random.default_rng(0)

    def drawn():
        scores = rng.normal(size=(20, 20)) + popularity * rng.normal(size=20) + signal * np.eye(20)
        return shares_below(scores)

    found = [mean_auc([drawn() for _ in range(6)]) for _ in range(400)]
    values = np.array([each["value"] for each in found])
    half = np.array([each["high"] - each["low"] for each in found]) / 2
    truth = values.mean() if signal else 0.5
    assert np.mean([each["low"] <= truth <= each["high"] for each in found]) > 0.92
    assert half.mean() == pytest.approx(1.96 * values.std(), rel=0.12)


def test_the_interval_of_a_perfect_auc_has_no_width():
    rng = np.random.default_rng(0)
    scores = 3 * rng.normal(size=20) + 100 * np.eye(20)
    assert mean_auc([shares_below(scores)]) == {"value": 1, "low": 1, "high": 1}


def test_the_mean_auc_counts_every_pair_alike():
    rng = np.random.default_rng(1)
    blocks = [shares_below(rng.integers(0, 4, size=(n, n)).astype(float)) for n in (2, 5, 9)]
    assert mean_auc(blocks)["value"] == pytest.approx(np.concatenate([np.diag(block) for block in blocks]).mean())


def test_an_untrained_model_guesses(data):
    model = model_of(data)
    result = evaluate_reversal(model, data, settings())
    assert json.loads(json.dumps(result)) == result
    assert not result["told"]
    for group in GROUPS:
        for direction in ("forward", "backward"):
            figures = result["groups"][group][direction]
            assert figures["auc"]["low"] <= 0.5 <= figures["auc"]["high"]
            assert figures["p"] > 0.02
            assert math.log(figures["answer_ppl"]) == pytest.approx(math.log(len(data.tokenizer)), abs=0.5)
    assert evaluate_reversal(model, data, settings()) == result
    assert not model.training


@pytest.mark.parametrize("name", ["pythia", "mla", "infini_all", "pythia:window=4"])
def test_scores_are_those_of_reading_the_whole_sentence(data, name, monkeypatch):
    name, _, option = name.partition(":")
    options = {"segment_length": 4} if name == "infini_all" else {"window": 4} if option else {}
    model = model_of(data, name, **options)
    prompts, answers = [[0, 5, 6, 7], [0, 8], [0, 9, 10, 11]], [[12, 13], [14, 15, 16], [17, 18], [19]]
    with torch.no_grad():
        scores = answer_scores(model, prompts, answers, most_tokens=5)
        for i, j in itertools.product(range(3), range(4)):
            whole = torch.tensor([[*prompts[i], *answers[j]]])
            expected = -model.token_losses(whole)[0, len(prompts[i]) - 1 :].sum()
            torch.testing.assert_close(scores[i, j], expected, atol=1e-4, rtol=1e-4)
        monkeypatch.setattr("newllm.evaluation.reversal.MOST_BYTES", 1)  # one prompt at a time
        torch.testing.assert_close(answer_scores(model, prompts, answers, most_tokens=1000), scores)


def test_memory_is_not_read(data):
    model = model_of(data, "infini_all", segment_length=4)
    before = evaluate_reversal(model, data, settings())
    with torch.no_grad():
        model(torch.randint(2, 700, (1, 40)), update_memory=True)
    assert model.get_memory_state()
    assert evaluate_reversal(model, data, settings()) == before
    assert model.get_memory_state(), "and is still there"


@given(st.integers(2, 12), st.integers(0, 1000), st.booleans())
def test_shares_below_count_the_answers_that_score_less(n, seed, tied):
    scores = np.random.default_rng(seed).normal(size=(n, n))
    scores = scores.round(0) if tied else scores
    shares = shares_below(scores)
    for i, j in itertools.product(range(n), range(n)):
        wins = [1.0 if other < scores[i, j] else 0.5 * (other == scores[i, j]) for other in np.delete(scores[i], j)]
        assert shares[i, j] == pytest.approx(np.mean(wins))
    bias = np.tile(scores[:1], (n, 1))  # each answer as likely after every question
    assert np.trace(shares_below(bias)) / n == pytest.approx(0.5)


def test_p_tells_pairs_from_chance():
    rng = np.random.default_rng(0)

    def p(signal):
        return permutation_p([shares_below(rng.normal(size=(10, 10)) + signal * np.eye(10)) for _ in range(6)])

    assert p(3) == 1 / 10_000
    assert p(-3) > 0.99
    by_chance = [p(0) for _ in range(60)]
    assert 0.3 < np.mean(by_chance) < 0.7
    assert np.mean(np.array(by_chance) < 0.1) < 0.25


def test_newllm_evaluate_asks_any_model_folder(data, text, tmp_path, capsys):
    model = model_of(data)
    model.save_pretrained(tmp_path)
    data.tokenizer.save_pretrained(tmp_path)
    results = command.evaluate(tmp_path, ["reversal"], settings(**text))
    command.print_results(results)
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1])["reversal"] == results["reversal"]
    rows = [line.split()[:3] for line in printed if line.startswith(("  forward ", "  both ", "  never "))]
    assert rows == [[g, d, str(2 * SIZES[g])] for g in GROUPS for d in ("forward", "backward")]
    assert any("fewer than 95% are answered forward" in line for line in printed)


def test_a_model_that_has_come_apart_is_measured_all_the_same(data, capsys):
    """Where exp leaves float64; a comparison would lose the run, and the last line would be no JSON."""
    model = model_of(data)
    with torch.no_grad():
        model.head.weight *= 1e6
    result = evaluate_reversal(model, data, settings())
    assert result["forward_ppl"] == math.inf
    command.print_results({"reversal": result})
    printed = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=lambda name: pytest.fail(name))
    assert printed["reversal"]["forward_ppl"] is None


def test_a_comparison_measures_what_it_trains_on(text, data, tmp_path):
    budget = {
        "seq_length": 64,
        "batch_size": 2,
        "max_tokens": 6 * 128,
        "evaluations": 1,
        "eval_tokens": 1000,
        "jobs": 1,
    }
    quick = {
        "position_window": 64,
        "sliding_window": 64,
        "sliding_stride": 32,
        "decode_context": 64,
        "efficiency": False,
    }
    values = text | SHAPE | budget | quick | {"models": ["pythia"], "reversal_share": 0.5}
    html = compare(ExperimentSettings(**values, out=str(tmp_path / "out")))
    (row,) = read_results(tmp_path / "out")["rows"]
    sentences = ReversalTask(data).training_sentences("forward")
    read = 3 * 128 / sum(len(ids) + 1 for ids in sentences)  # half of six steps of two windows
    assert row["reversal"]["readings"] == pytest.approx(read)
    assert row["reversal"]["pairs"] == 2 * sum(SIZES.values())
    assert "The reversal curse" in html.read_text()
