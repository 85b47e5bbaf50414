"""Training in two phases: what each of them trains, what is kept of both, and that interrupting changes nothing."""

import dataclasses
import json
import signal
from functools import partial

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file
from tiny_runs import STEP, metrics, run

from newllm.data import prepare
from newllm.errors import UserError
from newllm.evaluation.perplexity import token_weighted_loss
from newllm.experiments.compare import compare
from newllm.experiments.report.facts import facts
from newllm.experiments.results import read_results
from newllm.models import load_model
from newllm.resolution import resolve
from newllm.settings import ExperimentSettings, RunSettings
from newllm.training import new_model
from newllm.training.run import reconstruction_settings

MODEL = "v_dproj_restore_two_phase"
tiny = partial(tiny_runs.tiny, model=MODEL, reconstruction_epochs=2)


def initial_model(settings):
    torch.manual_seed(settings.seed)
    return new_model(settings, prepare(settings))


def is_restored(name):
    return "compress" in name or "expand" in name


def interrupt_in(phase, step):
    def on_progress(progress):
        if (progress.phase, progress.step) == (phase, step):
            signal.raise_signal(signal.SIGINT)

    return on_progress


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A finished run, and the progress it made."""
    folder, seen = tmp_path_factory.mktemp("whole") / "run", []
    run(tiny(text), folder, seen.append)
    return folder, seen


def test_a_run_folder_keeps_both_phases_apart(text, whole):
    folder, seen = whole
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml", "metrics.jsonl", "model", "reconstruction", "result.json",
    ]  # fmt: skip
    assert [path.name for path in (folder / "reconstruction").iterdir()] == ["metrics.jsonl"]
    result = json.loads((folder / "result.json").read_text())
    first, second = metrics(folder / "reconstruction"), metrics(folder)
    for lines, key in ((first, "reconstruction"), (second, "training")):
        validation = [line["val_loss"] for line in lines if "val_loss" in line]
        assert validation == sorted(validation, reverse=True)
        assert result[key]["best_val_loss"] == validation[-1]
        assert result[key]["steps"] == lines[-1]["step"] == 20
    assert max(line["train_loss"] for line in first if "train_loss" in line) < 0.1  # squares of small numbers
    assert min(line["train_loss"] for line in second if "train_loss" in line) > 1  # nats
    assert [(p.phase, p.step) for p in seen] == [(phase, n) for phase in ("reconstruction", "") for n in range(1, 21)]


def test_each_phase_trains_its_own_parameters_and_nothing_else(text, tmp_path):
    settings = tiny(text)
    before = initial_model(settings).state_dict()
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "run", interrupt_in("", 13))  # saves at the end of the next step
    first = load_file(tmp_path / "run" / "reconstruction" / "checkpoint-20" / "model.safetensors")
    second = load_file(tmp_path / "run" / "checkpoint-14" / "model.safetensors")
    for name, initial in before.items():
        between = first[f"model.{name}"]
        assert torch.equal(initial, between) != is_restored(name), name
        assert torch.equal(between, second[name]) == is_restored(name), name
    for folder, trained in (("reconstruction/checkpoint-20", True), ("checkpoint-14", False)):
        optimizer = torch.load(tmp_path / "run" / folder / "optimizer.pt", weights_only=True)
        states = [tuple(state["exp_avg"].shape) for state in optimizer["state"].values()]
        assert sorted(states) == sorted(tuple(t.shape) for name, t in before.items() if is_restored(name) == trained)
        assert len(states) == sum(len(group["params"]) for group in optimizer["param_groups"])


def test_the_first_phase_ends_with_its_best_weights_and_its_reported_loss(text, whole):
    settings = tiny(text)
    result = json.loads((whole[0] / "result.json").read_text())["reconstruction"]
    model = initial_model(settings)  # only the bottlenecks have changed in the first phase, and not since
    kept = load_model(whole[0]).state_dict()
    model.load_state_dict({name: kept[name] for name in kept if is_restored(name)}, strict=False)
    loss = token_weighted_loss(model.reconstruction(), prepare(settings).splits["validation"], settings)
    assert loss == result["best_val_loss"]


@pytest.mark.parametrize("moments", [[("reconstruction", 7)], [("", 9)], [("reconstruction", 20), ("", 1), ("", 20)]])
def test_an_interrupt_in_either_phase_and_the_same_call_continues_exactly(text, whole, tmp_path, moments):
    settings = tiny(text)
    for phase, step in moments:
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path / "run", interrupt_in(phase, step))
        assert not (tmp_path / "run" / "model").exists()
    run(settings, tmp_path / "run")
    for part in ("", "reconstruction"):
        ours, theirs = metrics(tmp_path / "run" / part), metrics(whole[0] / part)
        assert [line | {"seconds": 0} for line in ours] == [line | {"seconds": 0} for line in theirs]
    saved = [folder / "model" / "model.safetensors" for folder in (tmp_path / "run", whole[0])]
    assert saved[0].read_bytes() == saved[1].read_bytes()


def test_the_budget_of_the_first_phase(text):
    by_epochs = reconstruction_settings(tiny(text, max_tokens=None, samples=100, epochs=1), num_windows=100)
    assert (by_epochs.max_tokens, by_epochs.epochs) == (200 * 32, 2)
    assert reconstruction_settings(tiny(text, max_tokens=STEP), num_windows=100).max_tokens == STEP
    assert by_epochs.lr == tiny(text).reconstruction_lr


def test_patience_ends_the_first_phase_and_then_the_second_begins(text, tmp_path):
    """At this learning rate the reconstruction gets worse after some time."""
    changes = {"samples": 8, "epochs": 1, "max_tokens": None, "patience": 1}
    settings = tiny(text, **changes, reconstruction_epochs=40, reconstruction_lr=0.3, min_lr_ratio=0.9)
    result = run(settings, tmp_path / "run")
    first = json.loads((tmp_path / "run" / "result.json").read_text())["reconstruction"]
    assert first["stopped_early"]
    assert first["steps"] < 80
    assert first["best_step"] == first["steps"] - 2
    assert result.steps == 2


def test_a_loss_that_is_not_finite_names_the_setting_of_its_phase(text, tmp_path):
    with pytest.raises(UserError, match=r"loss of the reconstruction is (nan|inf) .*--reconstruction-lr"):
        run(tiny(text, reconstruction_lr=1e30, warmup_ratio=0, max_grad_norm=0), tmp_path / "run")


def test_settings_of_the_first_phase_count_only_where_they_are_set():
    plain = resolve(RunSettings())
    default, other = (dataclasses.replace(plain, reconstruction_epochs=n) for n in (10, 3))
    for training_only in (False, True):
        assert plain.hash(training_only=training_only) == default.hash(training_only=training_only)
        assert plain.hash(training_only=training_only) != other.hash(training_only=training_only)
    assert dataclasses.replace(plain, reconstruction_lr=0.01).hash() != plain.hash()


@pytest.mark.parametrize("name", ["reconstruction_lr", "reconstruction_epochs"])
def test_settings_of_the_first_phase_are_checked(name):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is 0: it must be greater than 0"):
        resolve(RunSettings(**{name: 0}))


def test_a_comparison_shows_the_second_phase_and_says_that_there_was_a_first(text, tmp_path):
    values = {name: value for name, value in dataclasses.asdict(tiny(text)).items() if name not in ("model", "seed")}
    values |= {"sliding_window": 64, "sliding_stride": 32, "efficiency": False, "eval_tokens": 500, "jobs": 1}
    settings = ExperimentSettings(**values, models=["v_dproj_restore", MODEL], out=str(tmp_path / "out"))
    results = read_results(compare(settings).parent)
    plain, two_phase = results["rows"]
    assert plain["reconstruction"] is None
    assert two_phase["reconstruction"]["tokens"] == two_phase["tokens"] == 20 * STEP
    assert [point["step"] for point in two_phase["curve"]] == [point["step"] for point in plain["curve"]]
    assert min(point.get("train_loss", 9) for point in two_phase["curve"]) > 1
    assert two_phase["layers"] == "2 × v_dproj (restore=two_phase)"
    assert dict(facts(results))["First phase"] == f"{MODEL}: reconstruction, 2,560 more tokens"
    other_seed = two_phase | {"seed": 1, "reconstruction": two_phase["reconstruction"] | {"tokens": 5120}}
    facts_of_both = dict(facts(results | {"rows": [plain, two_phase, other_seed]}))
    assert facts_of_both["First phase"] == f"{MODEL}: reconstruction, 2,560 to 5,120 more tokens"


def test_a_whole_number_in_a_file_and_by_flag_have_one_hash():
    assert resolve(RunSettings(epochs=2)).hash() == resolve(RunSettings(epochs=2.0)).hash()
