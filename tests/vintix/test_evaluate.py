"""Evaluation: episodes and their returns, the controls, scores and intervals, and the report of several seeds."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from vintix_stub import SMALL, group, small_model, told_of, write_dataset

from newllm.errors import UserError
from newllm.settings import to_yaml
from newllm.vintix.data import read_histories
from newllm.vintix.environments import from_spec, task_family
from newllm.vintix.evaluate import evaluate
from newllm.vintix.inference import VintixEngine
from newllm.vintix.play import agent, curve, interquartile_mean, normalised, play, without_memory
from newllm.vintix.report import write_report
from newllm.vintix.runs import check_alike, find_runs, load_weights
from newllm.vintix.settings import CollectSettings, VintixRun, VintixSettings
from newllm.vintix.train import train

sys.path.insert(0, str(Path(__file__).parents[1]))
from chromium import needs_chromium, overflow
from screenshot import browser, open_report, set_viewport


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("vintix") / "histories")


@pytest.fixture(scope="module")
def family(data):
    return from_spec(json.loads((data / "metadata.json").read_text())["family"])


def model_of(family):
    return small_model(groups=[group(family.observation_size, family.action_size)])


class Episodes:
    """A vector environment whose rows end their episodes after different numbers of steps; every step pays 1."""

    def __init__(self, lengths):
        self.lengths = np.array(lengths)

    def make(self, task_ids, seed):
        return self

    def reset(self, seed):
        self.step_num = np.zeros(len(self.lengths), dtype=int)
        return self.observe(), {}

    def step(self, actions):
        self.step_num += 1
        over = self.step_num == self.lengths
        info = {"final_obs": [row if ends else None for row, ends in zip(self.observe(), over, strict=True)]}
        self.step_num[over] = 0
        return self.observe(), np.ones(len(over)), over, np.zeros_like(over), info if over.any() else {}

    def observe(self):
        return self.step_num[:, None].astype(float)

    def close(self):
        pass


@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4), episodes=st.integers(1, 4))
def test_returns_are_of_whole_episodes_also_where_their_lengths_differ(lengths, episodes):
    starts = []

    def act(observation, reward, start):
        assert np.array_equal(start, observation[:, 0] == 0)
        starts.append(start)
        return observation

    played = play(act, Episodes(lengths), np.arange(len(lengths)), episodes, seed=0, recorded=1)
    assert np.array_equal(played.returns, np.repeat(np.array(lengths)[:, None], episodes, axis=1))
    assert played.observations[0, episodes - 1][:, 0].tolist() == list(range(lengths[0] + 1))


@pytest.mark.parametrize("name", ["point_reacher", "pendulum"])
def test_what_is_recorded_of_an_episode_ends_with_its_last_state(name):
    """Which the environment returns beside the first of the next episode: as where that episode had gone on."""
    family = task_family(CollectSettings(environment=name, train_tasks=1, validation_tasks=1, test_tasks=2))
    longer = dataclasses.replace(family, options=family.options | {"episode_length": family.episode_length + 1})
    ids = family.task_ids("test")
    recorded, goes_on = (
        play(without_memory(family.demonstrator(ids)), tasks, ids, 1, 0, recorded=2).observations
        for tasks in (family, longer)
    )
    for row in range(2):
        assert np.array_equal(recorded[row, 0], goes_on[row, 0][:-1])
        assert len(recorded[row, 0]) == family.episode_length + 1


def test_a_context_that_is_reset_holds_one_episode_and_otherwise_all(family):
    model, ids = model_of(family), family.task_ids("test")
    for context_reset, steps in ((True, family.episode_length), (False, 2 * family.episode_length)):
        engine = VintixEngine(model, len(ids))
        play(agent(engine, context_reset=context_reset), family, ids, 2, seed=0)
        assert engine.lengths.tolist() == [min(steps, model.config.context)] * len(ids)


def test_with_rewards_masked_nothing_depends_on_them(family):
    model, ids = model_of(family), family.task_ids("test")
    observation = np.zeros((len(ids), family.observation_size))
    start = np.ones(len(ids), dtype=bool)
    actions = []
    for reward in (0.0, 5.0):
        act = agent(VintixEngine(model, len(ids)), reward_masked=True)
        act(observation, np.full(len(ids), reward), start)
        actions.append(act(observation, np.full(len(ids), reward), ~start))
    assert np.array_equal(*actions)
    unmasked = agent(VintixEngine(model, len(ids)))
    unmasked(observation, np.zeros(len(ids)), start)
    assert not np.allclose(unmasked(observation, np.full(len(ids), 5.0), ~start), actions[0])


def test_the_demonstrator_scores_one_and_random_play_zero(data, family):
    tasks = json.loads((data / "metadata.json").read_text())["tasks"]["test"]
    played = play(without_memory(family.demonstrator(family.task_ids("test"))), family, family.task_ids("test"), 12, 1)
    assert interquartile_mean(normalised(played.returns, tasks)).mean() == pytest.approx(1, abs=0.15)
    assert normalised(np.array([[tasks[0]["random"], tasks[0]["demonstrator"]]]), tasks[:1]).tolist() == [[0.0, 1.0]]


@given(arrays(np.float64, st.tuples(st.integers(1, 30), st.integers(1, 3)), elements=st.floats(-9, 9)))
def test_interquartile_mean_is_the_mean_of_the_middle(scores):
    cut = len(scores) // 4
    middle = np.sort(scores, axis=0)[cut : len(scores) - cut]
    assert np.allclose(interquartile_mean(scores), middle.mean(axis=0))


def test_intervals_hold_their_value_and_shrink_with_more_tasks():
    chance = np.random.default_rng(0)
    widths = []
    for tasks in (8, 128):
        result = curve(chance.normal(0.5, 0.2, (2, tasks, 3)), resamples=300, seed=0)
        assert all(
            low <= value <= high
            for low, value, high in zip(*(result[k] for k in ("low", "value", "high")), strict=True)
        )
        widths.append(result["high"][0] - result["low"][0])
    assert widths[1] < widths[0]


def test_intervals_are_over_models_too():
    """Two models that score alike in all tasks: what is left to draw is which of them."""
    apart = np.repeat(np.array([0.2, 0.8])[:, None, None], 8, axis=1)
    result = curve(apart, resamples=300, seed=0)
    assert [result[key] for key in ("low", "value", "high")] == [[pytest.approx(x)] for x in (0.2, 0.5, 0.8)]
    alone = curve(apart[:1], resamples=300, seed=0)
    assert alone["low"] == alone["high"] == [pytest.approx(0.2)]


@pytest.fixture(scope="module")
def reported(data, tmp_path_factory):
    """A folder with two seeds, a control, their evaluation and the report."""
    folder = tmp_path_factory.mktemp("reported")
    small = SMALL | {"precision": "float32"}
    for run in (
        VintixRun(**small, seed=0),
        VintixRun(**small, seed=1),
        VintixRun(**small, seed=0, demonstrator_only=True),
    ):
        train(run, [data], folder / run.name)
    settings = VintixSettings(episodes=3, headline_episode=2, resamples=50, strip_tasks=2)
    evaluate([folder], settings, folder, "newllm vintix evaluate x", lambda line: None)
    write_report(folder)
    return folder


@needs_chromium
def test_report_is_whole_in_a_browser_on_a_desk_and_on_a_phone(reported):
    with browser(1280, 900) as driver:
        open_report(driver, reported / "report.html")
        drawn = {
            plot.get_attribute("id"): len(plot.find_elements("css selector", ".scatterlayer .trace"))
            for plot in driver.find_elements("css selector", ".plot")
        }
        assert drawn.keys() == {"plot-family-point_reacher", "plot-training"}
        assert drawn["plot-training"] == 3
        assert drawn["plot-family-point_reacher"] >= 7  # a line for each curve, and a band for those with an interval
        driver.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true })")
        for width in (1280, 390):
            set_viewport(driver, width, 900)
            driver.execute_async_script("setTimeout(arguments[0], 600)")  # plots are drawn again after a resize
            assert overflow(driver) == 0
        assert driver.get_log("browser") == []
        assert driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []


def test_report_of_several_seeds_and_a_control(reported):
    results = json.loads((reported / "evaluation.json").read_text())
    curves = results["families"][0]["curves"]
    assert curves["full"]["seeds"] == curves["context_reset"]["seeds"] == curves["reward_masked"]["seeds"] == [0, 1]
    assert curves["demonstrator_only"]["seeds"] == [0]
    assert all(len(values["value"]) == 3 for values in curves.values())
    assert np.array(results["families"][0]["scores"]["full"]).shape == (2, 5, 3)
    html = (reported / "report.html").read_text()
    assert "context reset" in html
    # How it was made, and what each interval is over.
    said = re.sub(r"<[^>]+>", " ", html.split("<script")[0])
    assert "noise and all (target taken); the histories, of 1000 steps, have noise of power p = 1 in their" in said
    assert "the actions that were taken in the histories, noise and all (Algorithm Distillation" in said
    assert "ε(n) = (1 − (n / 900)^1)^(1/1) until step n = 900 and 0 after it (p = 1, f = 0.1)" in said
    assert "float32 in training; float32 in play" in said
    assert "with 2 by √(1/2)" in said
    rows = [re.sub(r"<[^>]+>", " ", row).split() for row in re.findall(r"<tr>.*?</tr>", html)]
    over = {" ".join(row[:2]): row[-3:] for row in rows}
    assert over["model its"] == over["context reset"] == ["tasks", "and", "seeds"]
    assert over["demonstrator only"][-2:] == ["0", "tasks"]
    assert over["random uniform"][-2:] == ["—", "tasks"]
    assert html.count('<svg class="plane"') == 4
    assert not re.search(r'(src|href)="https?:', html.split("<script")[0])
    # Every axis says what is on it, and the legend tells each run from the others.
    shown = json.loads(re.search(r'id="report-data">(.*?)</script>', html)[1])["figures"]
    scale = "(0 random play, 1 demonstrator)"
    titles = {name: (figure["xTitle"], figure["yTitle"]) for name, figure in shown.items()}
    assert titles == {
        "plot-family-point_reacher": ("episode", f"normalised score {scale}"),
        "plot-training": ("optimizer step", f"score on validation tasks {scale}"),
    }
    assert all(f'class="legend" data-plot="{name}"' in html for name in shown)
    runs = shown["plot-training"]["curves"]
    assert [curve["name"] for curve in runs] == ["seed-0", "seed-1", "demonstrator_only-0"]
    assert len({(curve["color"], curve["dash"]) for curve in runs}) == 3


def test_test_tasks_begin_in_states_that_training_has_not_begun_in(tmp_path):
    """Where the environments of a vector are seeded one by one, and all seeds of the settings are the same."""
    data = write_dataset(tmp_path / "histories", environment="pendulum", train_tasks=8)
    train(VintixRun(**SMALL), [data], tmp_path / "run")
    settings = VintixSettings(episodes=1, headline_episode=1, resamples=2, strip_tasks=5)
    results = json.loads(evaluate([tmp_path / "run"], settings, tmp_path, "", lambda line: None).read_text())
    first = [strip["observations"][0] for strip in results["families"][0]["strips"]]
    histories = read_histories(data)
    mean, std = (np.array(histories.metadata[key]) for key in ("observation_mean", "observation_std"))
    begun = histories.observation[histories.step_num == 0] * std + mean
    assert np.abs(np.array(first)[:, None] - begun).max(axis=-1).min() > 1e-3


def finished(folder, *, collect=None, options=None, **values):
    """A run folder as training leaves it, but for its weights: for what is refused before anything is played."""
    folder.mkdir(parents=True)
    run = VintixRun(**SMALL | {"precision": "float32"} | values)
    few = {"train_tasks": 2, "validation_tasks": 1, "test_tasks": 2}
    data = told_of(CollectSettings(**few | (collect or {})), **options or {})
    (folder / "config.yaml").write_text(to_yaml(run))
    (folder / "data.json").write_text(json.dumps([data]))
    (folder / "metrics.jsonl").write_text("")
    (folder / "result.json").write_text(json.dumps({"model": "vintix", "training": {}}))
    return folder


def measured(*folders):
    evaluate(list(folders), VintixSettings(episodes=2, headline_episode=1), folders[0], "", lambda line: None)


CHANGES = {
    "target": "demonstrator",
    "steps": 5,
    "lr": 0.5,
    "context": 12,
    "hidden_size": 8,
    "dropout": 0.0,
    "evaluations": 2,
    "precision": "bf16",
}


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize(("name", "value"), CHANGES.items())
def test_runs_of_other_settings_are_not_measured_together(tmp_path, name, value, control):
    one = finished(tmp_path / "seed-0")
    two = finished(tmp_path / "other", seed=1, demonstrator_only=control, **{name: value})
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(UserError, match=rf"{flag} is \S+ in {one}, {value} in {two}: .* train one of them again"):
        measured(tmp_path)


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize(("name", "value"), [("history_steps", 96), ("noise_power", 3.0), ("collect_seed", 1)])
def test_nor_are_runs_on_histories_of_other_settings(tmp_path, name, value, control):
    finished(tmp_path / "seed-0")
    two = finished(tmp_path / "other", seed=1, demonstrator_only=control, collect={name: value})
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(UserError, match=rf"{flag} is \S+ in the histories of .*seed-0, {value} in those of {two}"):
        measured(tmp_path)


def test_nor_are_runs_on_other_noise_unless_they_are_the_control(tmp_path):
    first = finished(tmp_path / "seed-0")
    other = finished(tmp_path / "seed-1", seed=1, collect={"noise_free_share": 1.0})
    with pytest.raises(UserError, match=r"--noise-free-share is 0\.1 in the histories of"):
        measured(first, other)
    control = finished(tmp_path / "control", demonstrator_only=True, collect={"noise_free_share": 1.0})
    check_alike(find_runs([first, control], pytest.fail))


def test_nor_are_runs_on_other_tasks(tmp_path):
    first, other = finished(tmp_path / "seed-0"), finished(tmp_path / "seed-1", seed=1, options={"episode_length": 9})
    with pytest.raises(UserError, match="have learned different tasks of point_reacher"):
        measured(first, other)


def test_where_and_how_long_a_run_was_trained_does_not_matter(tmp_path):
    first = finished(tmp_path / "seed-0")
    other = finished(tmp_path / "seed-1", seed=1, threads=2, jobs=2, device="cpu", checkpoint_minutes=9.0, seeds=[1])
    check_alike(find_runs([first, other], pytest.fail))


def test_a_seed_counts_once(tmp_path):
    first, again = finished(tmp_path / "a" / "seed-0"), finished(tmp_path / "b" / "seed-0")
    for folders in ((first, again), (first, tmp_path / "a")):
        with pytest.raises(UserError, match=r"seed-0 are both of seed 0: name one run of each seed"):
            measured(*folders)


def test_what_is_passed_over_is_said(tmp_path):
    folder = tmp_path / "runs"
    old, begun = finished(folder / "seed-0~old"), finished(folder / "seed-1", seed=1)
    (begun / "result.json").write_text('{"model": "vintix"}')
    with pytest.raises(UserError, match=r"no finished run .*, only seed-0~old \(moved aside .*, seed-1 \(not finished"):
        find_runs([folder], pytest.fail)
    finished(folder / "seed-2", seed=2)
    said = []
    assert [run.seed for run in find_runs([folder], said.append)] == [2]
    assert [line.split("passes over ")[1].split(" ")[0] for line in said] == ["seed-0~old", "seed-1"]
    assert [run.seed for run in find_runs([old], pytest.fail)] == [0]  # when it is named itself


@pytest.mark.parametrize("name", ["config.yaml", "data.json", "metrics.jsonl"])
def test_a_damaged_file_of_a_run_is_told(tmp_path, name):
    folder = finished(tmp_path / "seed-0")
    path = folder / name
    path.write_text(path.read_text()[: path.stat().st_size // 2] or '{"step": 1, ')
    with pytest.raises(UserError, match=rf"{folder} is damaged \(.*move it away"):
        find_runs([folder], pytest.fail)


def test_damaged_weights_are_told(tmp_path):
    folder = finished(tmp_path / "seed-0")
    model_of(task_family(CollectSettings())).save_pretrained(folder / "model")
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (run,) = find_runs([folder], pytest.fail)
    with pytest.raises(UserError, match=r"is damaged \(model: "):
        load_weights(run)


def test_what_cannot_be_evaluated_is_refused(data, tmp_path):
    settings = VintixSettings(episodes=2, headline_episode=1)
    with pytest.raises(UserError, match="no such folder"):
        evaluate([tmp_path / "none"], settings, tmp_path, "")
    with pytest.raises(UserError, match="no finished run"):
        evaluate([tmp_path], settings, tmp_path, "")
    train(VintixRun(**SMALL, demonstrator_only=True), [data], tmp_path / "control")
    with pytest.raises(UserError, match="demonstrator-only"):
        evaluate([tmp_path], settings, tmp_path, "")
    with pytest.raises(UserError, match="headline"):
        evaluate([tmp_path], VintixSettings(episodes=2), tmp_path, "")
