"""A comparison from the outside: what it leaves, what it keeps, and what it does when a model fails."""

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
from pathlib import Path

import psutil
import pytest
import yaml
from tiny_runs import tiny_comparison as tiny

from newllm.cli import main
from newllm.commands.flags import Parser
from newllm.data import prepare
from newllm.errors import UserError
from newllm.evaluation.perplexity import evaluate
from newllm.experiments import run
from newllm.experiments.command_line import command_line
from newllm.experiments.compare import compare, resolve_out, run_folder
from newllm.experiments.figures import NO_BREAK
from newllm.experiments.results import read_results
from newllm.models import load_model
from newllm.resolution import resolve
from newllm.settings import CONFIGS_FOLDER, ExperimentSettings, RunSettings


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """A comparison of two models and two seeds that is done."""
    out = tmp_path_factory.mktemp("compare") / "out"
    return compare(tiny(text, out, seeds=[0, 1])).parent


def test_a_comparison_leaves_runs_results_and_a_report(text, finished):
    runs = ["mqa-seed0", "mqa-seed1", "pythia-seed0", "pythia-seed1"]
    assert sorted(path.name for path in finished.iterdir()) == [*runs, "report.html", "report.md", "results.json"]
    assert not finished.with_name("out.newllm-lock").exists()
    results = read_results(finished)
    assert [(row["model"], row["seed"]) for row in results["rows"]] == [
        ("pythia", 0), ("mqa", 0), ("pythia", 1), ("mqa", 1),
    ]  # fmt: skip
    assert results["baseline"] == "pythia"
    assert results["failed"] == []
    for row in results["rows"]:
        assert row["tokens"] == 6 * 128
        assert row["valid"]
        assert row["sample"]
        assert row["val_ppl"] == pytest.approx(math.exp(row["val_loss"]))
        assert row["curve"][-1]["val_loss"] >= row["val_loss"]
    assert results["rows"][1]["layers"] == "2 × pythia (num_kv_heads=1)"
    assert results["rows"][0]["layers"] == "2 × pythia"


LEAKY = """
import torch
from newllm.models.layers import register_layer
from newllm.models.layers.pythia import PythiaLayer

@register_layer("leaks_late")
class LeaksLate(PythiaLayer):
    def forward(self, x, **inputs):
        y = super().forward(x, **inputs)
        late = y[:, 170:]  # no window of the checks' own is as long
        return torch.cat([y[:, :170], late + late.mean(dim=1, keepdim=True)], dim=1) if late.shape[1] else y
"""


def test_a_leak_beyond_the_position_window_is_found(text, tmp_path):
    """Perplexity is also taken in windows of training, which may be longer."""
    plugin = tmp_path / "leaky.py"
    plugin.write_text(LEAKY)
    windows = {"seq_length": 192, "position_window": 32, "sliding_window": 64}
    settings = tiny(text, tmp_path / "out", models=["leaks_late"], plugin=str(plugin), max_tokens=2 * 768, **windows)
    compare(settings)
    (row,) = read_results(tmp_path / "out")["rows"]
    failed = [check["name"] for check in row["checks"] if check["passed"] is False and "trained" in check["name"]]
    assert failed == ["future, as trained"]
    assert not row["valid"]


def test_a_row_says_what_its_model_does(text, finished):
    """Validation and test figures of a row are those of the model in the run folder."""
    settings = resolve(tiny(text, finished))
    data = prepare(settings)
    for row in read_results(finished)["rows"][:2]:
        folder = finished / f"{row['model']}-seed0"
        validation, test = (
            evaluate(load_model(folder), data.splits[name], settings) for name in ("validation", "test")
        )
        assert (validation["loss"], validation["bits_per_byte"]) == (row["val_loss"], row["bits_per_byte"])
        assert (test["ppl"], test["bits_per_byte"]) == (row["test_ppl"], row["test_bits_per_byte"])
        assert test["sliding_ppl"] == row["sliding_ppl"]


def test_started_again_it_trains_nothing_and_says_the_same(text, finished, monkeypatch):
    before = read_results(finished)

    def no_training(*arguments):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(run, "train", no_training)
    compare(tiny(text, finished, seeds=[0, 1]))
    after = read_results(finished)
    assert after["rows"] == before["rows"]


def test_more_seeds_and_models_train_only_what_is_new(text, finished, monkeypatch):
    trained = []
    train = run.train
    monkeypatch.setattr(run, "train", lambda one, *rest: trained.append((one.model, one.seed)) or train(one, *rest))
    compare(tiny(text, finished, models=["pythia", "mqa", "pythia_nope"], seeds=[0, 1]))
    assert trained == [("pythia_nope", 0), ("pythia_nope", 1)]


def test_other_settings_train_anew_and_keep_the_old_run_aside(text, tmp_path, capsys):
    for tokens in (128, 256):
        compare(tiny(text, tmp_path / "out", models=["mqa"], max_tokens=tokens))
        assert read_results(tmp_path / "out")["rows"][0]["tokens"] == tokens
    assert json.loads((tmp_path / "out" / "mqa-seed0~old" / "result.json").read_text())["row"]["tokens"] == 128
    assert "holds a run with other settings or data: kept as mqa-seed0~old\n" in capsys.readouterr().out


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_comparison_that_fails_replaces_nothing(text, finished, tmp_path):
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    with pytest.raises(UserError, match="the training loss is"):
        compare(tiny(text, out, models=["mqa"], lr=1e30, warmup_ratio=0.0, max_grad_norm=0.0))
    assert contents(out) == contents(finished)


def test_other_runs_keep_the_results_of_those_before(text, finished, tmp_path, capsys):
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    for path in (file for file in out.iterdir() if file.is_file()):
        path.unlink()
    for seeds in ([0, 1], [1, 0]):
        compare(tiny(text, out, models=["pythia", "mqa"], seeds=seeds))
    assert not list(out.glob("*~old*"))  # the same runs
    compare(tiny(text, out, models=["pythia"]))
    assert (
        f"{out} holds a comparison of other runs: kept as results~old.json, with its report\n"
        in capsys.readouterr().out
    )
    assert len(read_results(out)["rows"]) == 1
    assert len(read_results(out / "results~old.json")["rows"]) == 4
    assert sorted(path.name for path in out.glob("*~old*")) == ["report~old.html", "report~old.md", "results~old.json"]
    compare(tiny(text, out, models=["mqa"]))
    assert len(read_results(out / "results~old2.json")["rows"]) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("report.md", "mine", "holds a report.md of something else"),
        ("results.json", "[]", "is not a result of `newllm compare`"),
        ("results.json", "{", "is not valid JSON"),
        ("result.json", '{"hash": "a"}', "is the folder of a run"),
        ("report.html/mine", "mine", "holds a report.html of something else"),
    ],
)
def test_a_folder_of_something_else_is_not_touched(text, tmp_path, name, content, message):
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        compare(tiny(text, tmp_path / "out", models=["mqa"]))
    assert file.read_text() == content
    assert len(list((tmp_path / "out").iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [("mqa-seed0", "mqa-seed0 is a file"), ("mqa-seed0/thesis.tex", "mqa-seed0 holds other files")],
)
def test_what_stands_in_the_place_of_a_run_folder_is_not_touched(text, tmp_path, name, message):
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(UserError, match=message):
        compare(tiny(text, tmp_path / "out", models=["mqa"]))
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "mine"


def test_a_full_disk_is_told_also_where_there_is_no_room_to_write_it_down(text, tmp_path, monkeypatch):
    def no_space(*arguments):
        (tmp_path / "out" / "mqa-seed0" / "error.txt").mkdir()  # nor can anything be written there
        raise UserError("no space left on the disk")

    monkeypatch.setattr(run, "train", no_space)
    with pytest.raises(UserError, match="no space left on the disk"):
        compare(tiny(text, tmp_path / "out", models=["mqa"]))


def test_a_report_cannot_replace_a_folder(text, finished, tmp_path):
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    (out / "report.md").unlink()
    (out / "report.md").mkdir()
    with pytest.raises(UserError, match=r"report\.md is a folder there"):
        compare(tiny(text, out, seeds=[0, 1]))


def test_paths_of_results_may_begin_with_the_home_folder(text, finished, tmp_path, monkeypatch):
    """As in a config file, where no shell replaces ~."""
    monkeypatch.setenv("HOME", str(finished.parent))
    monkeypatch.chdir(finished)
    settings = tiny(text, "~/again", reuse=["~/nothing"])
    with pytest.raises(UserError, match=f"{finished.parent / 'nothing'}.* does not exist"):
        compare(settings)
    settings.reuse = ["."]
    report = compare(settings)
    assert report.parent == finished.parent / "again"
    assert "2 of 2 runs: 2 from out (" in report.read_text()


def test_the_folder_we_are_in_may_be_the_compare_folder(text, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "here")
    compare(tiny(text, ".", models=["mqa"]))
    assert sorted(os.listdir()) == ["mqa-seed0", "notes.txt", "report.html", "report.md", "results.json"]
    assert os.listdir("..") == ["here"]


def test_speed_and_memory_are_the_same_for_all_seeds_and_kept(text, finished, monkeypatch):
    calls = []

    def measure_all(folders, settings):
        calls.append([folder.name for folder in folders])
        return [{"decode_ms_per_token": float(index), "efficiency_error": None} for index in range(len(folders))]

    monkeypatch.setattr("newllm.experiments.compare.measure_all", measure_all)
    for _ in range(2):
        compare(tiny(text, finished, seeds=[0, 1], efficiency=True))
    assert calls == [["pythia-seed0", "mqa-seed0"]]
    kept = (finished / "efficiency.json").read_text()
    (finished / "efficiency.json").write_text(kept[: len(kept) // 2])
    compare(tiny(text, finished, seeds=[0, 1], efficiency=True))
    assert len(calls) == 2
    assert (finished / "efficiency.json").read_text() == kept
    assert [row["decode_ms_per_token"] for row in read_results(finished)["rows"]] == [0, 1, 0, 1]


OWN = """
from newllm.models.layers import register_layer
from newllm.models.layers.pythia import PythiaLayer

@register_layer("own")
class Own(PythiaLayer):
    pass
"""


def test_runs_of_an_earlier_comparison_are_taken_over(text, finished, tmp_path, monkeypatch, capsys):
    """Elsewhere, with one model more and a plugin: only what no results.json holds is trained."""
    plugin = tmp_path / "own.py"
    plugin.write_text(OWN)
    trained = []
    train = run.train
    monkeypatch.setattr(run, "train", lambda one, *rest: trained.append((one.model, one.seed)) or train(one, *rest))
    settings = tiny(text, tmp_path / "out", models=["pythia", "mqa", "own"], seeds=[0, 1], plugin=str(plugin))
    settings.reuse = [str(finished), str(finished / "results.json")]
    report = compare(settings)
    assert trained == [("own", 0), ("own", 1)]
    results, before = read_results(tmp_path / "out"), read_results(finished)
    losses = {(row["model"], row["seed"]): row["test_loss"] for row in before["rows"]}
    for row in results["rows"]:
        if row["model"] == "own":
            assert row.get("reused") is None
            assert row["test_loss"] == losses["pythia", row["seed"]], "the same layer by another name"
        else:
            assert row["test_loss"] == losses[row["model"], row["seed"]]
            assert row["reused"]["created"] == before["created"]
    assert "4 of 6 runs: 4 from out (" in report.read_text()
    assert f"{finished / 'results.json'}: none of its runs" in capsys.readouterr().out, "the first had them all"


def test_what_was_taken_over_is_kept_without_saying_again_from_where(text, finished, tmp_path, monkeypatch):
    """As by the command that the report prints."""
    settings = tiny(text, tmp_path / "out", models=["mqa"], reuse=[str(finished)])
    before = read_results(compare(settings).parent)["rows"]
    monkeypatch.setattr(run, "train", lambda *arguments: pytest.fail("it was trained"))
    assert main(shlex.split(command_line(resolve(settings)))[1:]) == 0
    assert read_results(tmp_path / "out")["rows"] == before
    assert before[0]["reused"]["from"] == "out"


def test_how_states_are_trained_is_nothing_to_a_model_without_one(text, finished, tmp_path):
    """And everything to one with a state, whose runs are others then."""
    models, out = ["pythia", "continuous_fuse"], tmp_path / "one_pass"
    one_pass = compare(tiny(text, out, models=models)).parent
    settings = tiny(text, tmp_path / "two_passes", models=models, lagged_passes=2, reuse=[str(finished), str(one_pass)])
    rows = read_results(compare(settings).parent)["rows"]
    assert [(row["model"], bool(row.get("reused"))) for row in rows] == [("pythia", True), ("continuous_fuse", False)]


@pytest.mark.parametrize("change", [{"max_tokens": 128}, {"seeds": [2]}, {"vocab_size": 301}])
def test_runs_with_other_settings_are_not_taken_over(text, finished, tmp_path, change):
    settings = tiny(text, tmp_path / "out", models=["mqa"], reuse=[str(finished)], **change)
    assert [row.get("reused") for row in read_results(compare(settings).parent)["rows"]] == [None]


def test_a_run_whose_perplexity_was_infinite_is_taken_over(text, finished, tmp_path):
    results = json.loads((finished / "results.json").read_text())
    for row in results["rows"]:
        row["test_ppl"] = None  # as results.json has it
    (tmp_path / "results.json").write_text(json.dumps(results))
    settings = tiny(text, tmp_path / "out", models=["pythia", "mqa"], reuse=[str(tmp_path)])
    rows = read_results(compare(settings).parent)["rows"]
    assert [(row["test_ppl"], bool(row["reused"])) for row in rows] == [(None, True)] * 2


def test_a_seed_that_comes_apart_does_not_cost_the_others_their_table(text, tmp_path, monkeypatch, capsys):
    make_row = run.make_row

    def one_infinite(settings, *rest):
        return make_row(settings, *rest) | ({"test_ppl": math.inf} if settings.seed == 1 else {})

    monkeypatch.setattr(run, "make_row", one_infinite)
    out = compare(tiny(text, tmp_path / "out", models=["mqa"], seeds=[0, 1, 2], jobs=1)).parent
    finite = [row["test_ppl"] for row in read_results(out)["rows"] if row["test_ppl"] is not None]
    assert len(finite) == 2
    assert f"{sum(finite) / 2:.1f}{NO_BREAK}±" in capsys.readouterr().out


def test_runs_on_another_text_are_not_taken_over(text, finished, tmp_path):
    """The settings are the same: the file of that name holds something else."""
    results = json.loads((finished / "results.json").read_text())
    results["data"]["splits"]["train"]["bytes"] += 1
    (tmp_path / "results.json").write_text(json.dumps(results))
    settings = tiny(text, tmp_path / "out", models=["mqa"], reuse=[str(tmp_path)])
    assert [row.get("reused") for row in read_results(compare(settings).parent)["rows"]] == [None]


def test_runs_in_another_precision_are_not_taken_over_as_if_it_were_the_same(text, finished, tmp_path, capsys):
    """'auto' was another one there: named, it is the same run."""
    results = json.loads((finished / "results.json").read_text())
    here, there = ("bf16", "float32") if results["machine"]["native_bf16"] else ("float32", "bf16")
    results["machine"]["native_bf16"] = not results["machine"]["native_bf16"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    for precision, taken in (("auto", False), (here, False), (there, True)):
        settings = tiny(text, tmp_path / precision, models=["mqa"], reuse=[str(tmp_path)], precision=precision)
        (row,) = read_results(compare(settings).parent)["rows"]
        assert bool(row.get("reused")) == taken
    assert capsys.readouterr().out.count(f"were computed in {there}, and those of this comparison are in {here}") == 2


def test_a_finished_run_that_does_not_say_on_which_text_is_another_run(text, finished, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(finished, tmp_path / "out")
    path = out / "mqa-seed0" / "result.json"
    result = json.loads(path.read_text())
    del result["data"]
    path.write_text(json.dumps(result))
    monkeypatch.setattr(run, "train", lambda *arguments: 1 / 0)
    compare(tiny(text, out))
    assert "mqa-seed0 holds a run with other settings or data: kept as mqa-seed0~old" in capsys.readouterr().out


def test_a_folder_from_a_machine_of_another_precision_is_not_gone_on_in(text, finished, tmp_path, monkeypatch):
    """Its runs would be kept beside ours, and be taken for runs in our precision ever after."""
    out = shutil.copytree(finished, tmp_path / "out")
    results = json.loads((out / "results.json").read_text())
    results["machine"]["native_bf16"] = not results["machine"]["native_bf16"]
    (out / "results.json").write_text(json.dumps(results))
    monkeypatch.setattr(run, "train", lambda *arguments: pytest.fail("it was trained"))
    with pytest.raises(UserError, match=r"its runs were computed in (bf16|float32), .* --reuse"):
        compare(tiny(text, out, seeds=[0, 1]))
    assert json.loads((out / "results.json").read_text()) == results


def test_what_a_plugin_was_is_told_by_the_code_that_ran(text, tmp_path, monkeypatch):
    """Not by what the file holds when the run has ended: whoever waits for a run edits it."""
    plugin = tmp_path / "edited.py"
    plugin.write_text(OWN.replace('"own"', '"edited"'))
    trained = []
    train = run.train

    def then_edit(one, *rest):
        result = train(one, *rest)
        trained.append(one.model)
        plugin.write_text(plugin.read_text() + "    extra = 1\n")
        return result

    monkeypatch.setattr(run, "train", then_edit)
    settings = tiny(text, tmp_path / "out", models=["edited"], plugin=str(plugin))
    for _ in range(2):
        compare(settings)
    assert trained == ["edited", "edited"], "the second time it is another model"


def test_a_file_that_is_no_comparison_is_refused_before_anything_trains(text, tmp_path):
    (tmp_path / "half.json").write_text('{"rows": [')
    other = "not valid JSON .*, give a results.json written by"
    for path, complaint in ((tmp_path / "half.json", other), (tmp_path / "none", "does not exist")):
        with pytest.raises(UserError, match=complaint):
            compare(tiny(text, tmp_path / "out", reuse=[str(path)]))
    assert not list((tmp_path / "out").glob("*"))


def test_a_record_edited_by_hand_is_refused_before_anything_trains(text, finished, tmp_path):
    results = json.loads((finished / "results.json").read_text())
    for row in results["rows"]:
        row["ppl_by_position"][0]["ppl"] = "low"
    (tmp_path / "edited.json").write_text(json.dumps(results))
    settings = tiny(text, tmp_path / "out", models=["mqa"], reuse=[str(tmp_path / "edited.json")])
    with pytest.raises(UserError, match=r"edited.json: row of mqa, seed 0: 'ppl_by_position' in it is not as a"):
        compare(settings)
    assert not list((tmp_path / "out").glob("*"))


def test_speed_of_a_run_taken_over_is_measured_here(text, finished, tmp_path):
    settings = tiny(text, tmp_path / "out", models=["mqa"], reuse=[str(finished)], efficiency=True)
    settings.efficiency_seconds = 0.1
    (row,) = read_results(compare(settings).parent)["rows"]
    assert row["reused"]
    assert row["cache_bytes_per_token"] == 2 * 2 * 1 * 16 * 2 or row["cache_bytes_per_token"] == 2 * 2 * 1 * 16 * 4
    assert row["decode_ms_per_token"] > 0


@pytest.mark.parametrize("flags", [
    "--config caches",
    "--config recall --seeds 4 5",
    "--config two_pass --models discrete_extra --epochs 1.125",
    "--scale small --models pythia mqa",
    "--scale quickstart --models mla --lr 0.002 --efficiency false",
])  # fmt: skip
def test_the_command_in_the_report_is_short_and_means_the_same(flags):
    parser = Parser("compare", configs=CONFIGS_FOLDER)
    parser.add_settings(ExperimentSettings)
    settings = resolve(parser.settings(parser.parse(flags.split())))
    said = command_line(settings)
    assert resolve(parser.settings(parser.parse(shlex.split(said)[2:]))) == settings
    assert len(said) <= len(f"newllm compare {flags}")


PLUGIN = """
from newllm.models.layers.base import Layer, register_layer

@register_layer("{name}")
class Broken(Layer):
    def __init__(self, hidden_size, num_heads, intermediate_size):
        super().__init__()

    def forward(self, x, *, positions, mask, state):
        raise ZeroDivisionError("nothing to divide by")
"""


def test_a_failing_model_is_recorded_and_the_others_go_on(text, tmp_path, capsys):
    plugin = tmp_path / "broken.py"
    plugin.write_text(PLUGIN.format(name="broken_one"))
    settings = tiny(text, tmp_path / "out", models=["broken_one", "mqa"], plugin=str(plugin))
    flags = shlex.split(command_line(resolve(settings)))[1:]
    assert main(flags) == 1
    results = read_results(tmp_path / "out")
    assert [row["model"] for row in results["rows"]] == ["mqa"]
    assert results["failed"] == [{"model": "broken_one", "seed": 0, "error": "ZeroDivisionError: nothing to divide by"}]
    assert "ZeroDivisionError" in (tmp_path / "out" / "broken_one-seed0" / "error.txt").read_text()
    assert "failed: ZeroDivisionError: nothing to divide by" in capsys.readouterr().out


def test_when_every_model_fails_that_is_one_line(text, tmp_path, capsys):
    plugin = tmp_path / "broken.py"
    plugin.write_text(PLUGIN.format(name="broken_two"))
    settings = tiny(text, tmp_path / "out", models=["broken_two"], plugin=str(plugin))
    assert main(shlex.split(command_line(resolve(settings)))[1:]) == 1
    assert re.fullmatch(
        "newllm: error: every run failed; broken_two, seed 0: ZeroDivisionError: nothing to divide by .*error.txt.*\n",
        capsys.readouterr().err,
    )


def test_a_wrong_model_is_found_before_anything_is_made(text, tmp_path):
    with pytest.raises(UserError, match="did you mean 'mqa'"):
        compare(tiny(text, tmp_path / "out", models=["pythia", "mqaa"]))
    assert not (tmp_path / "out").exists()


def test_two_comparisons_do_not_share_a_folder(text, tmp_path):
    parent = psutil.Process(os.getppid())
    holder = {"pid": parent.pid, "started": parent.create_time()}
    (tmp_path / "out.newllm-lock").write_text(json.dumps(holder))
    with pytest.raises(UserError, match=f"process {parent.pid}"):
        compare(tiny(text, tmp_path / "out"))


def test_an_interrupted_comparison_is_readable_and_continues(text, tmp_path, monkeypatch):
    train = run.train

    def interrupted(one, *rest):
        if one.model == "mqa":
            raise KeyboardInterrupt
        return train(one, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(run, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(tiny(text, tmp_path / "out"))
    assert [row["model"] for row in read_results(tmp_path / "out")["rows"]] == ["pythia"]
    assert (tmp_path / "out" / "report.html").is_file()
    compare(tiny(text, tmp_path / "out"))
    assert [row["model"] for row in read_results(tmp_path / "out")["rows"]] == ["pythia", "mqa"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scale": "small"},
        {"scale": "pythia-70m", "seeds": [3, 4], "lr": 5e-5},
        {"models": ["gqa:num_kv_heads=1,window=64", "my model"], "name": "Windows & heads", "out": "runs/a b"},
        {"samples": 100, "tokenizer": "some/name", "efficiency": False, "report_to": ["tensorboard"]},
        {"epochs": 0.5, "eval_tokens": 100, "max_documents": 7},
        {"scale": "pythia-70m", "samples": 10_000, "epochs": 3.0},
    ],
)
def test_the_printed_command_repeats_the_comparison(changes):
    settings = resolve(ExperimentSettings(**changes))
    words = shlex.split(command_line(settings))
    assert words[:2] == ["newllm", "compare"]
    parser = Parser("compare", configs=CONFIGS_FOLDER)
    parser.add_settings(ExperimentSettings)
    assert dataclasses.asdict(resolve(parser.settings(parser.parse(words[2:])))) == dataclasses.asdict(settings)


def test_a_config_is_not_named_that_sets_what_the_comparison_leaves_open():
    config = yaml.safe_load((CONFIGS_FOLDER / "caches_70m.yaml").read_text())
    assert config["eval_tokens"]
    assert "--config caches_70m" in command_line(resolve(ExperimentSettings(**config)))
    test_the_printed_command_repeats_the_comparison(config | {"eval_tokens": None})


def test_folder_names_are_safe(tmp_path):
    long = [f"gqa:{','.join(f'position.slope=0.{digit}' for digit in '1' * 30)},window={n}" for n in (1, 2)]
    names = {run_folder(tmp_path, RunSettings(model=model)).name for model in long}
    assert len(names) == 2
    assert {len(name.encode()) for name in names} == {200}
    settings = resolve(RunSettings(model="gqa:num_kv_heads=1,position.type=none", seed=2))
    assert run_folder(tmp_path, settings).name == "gqa_num_kv_heads=1,position.type=none-seed2"
    for out in (None, ""):  # of a variable that is not set
        settings = ExperimentSettings(name="Heads / windows: a look", out=out)
        assert resolve_out(settings) == Path("runs/Heads_windows_a_look-quickstart").resolve()
