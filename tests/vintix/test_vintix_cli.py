"""The commands of Vintix: from histories to the report, configs by name, and one line for what is wrong."""

import json

import pytest
import yaml
from vintix_stub import SMALL, write_dataset

from newllm.cli import main
from newllm.vintix.settings import CONFIGS_FOLDER, VintixSettings, config_names

FLAGS = [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def histories(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("vintix") / "histories")


def test_train_and_evaluate(histories, tmp_path, capsys):
    out = tmp_path / "runs"
    assert main(["vintix", "train", str(histories), *FLAGS, "--seeds", "4", "--out", str(out)]) == 0
    assert (out / "seed-4" / "model" / "model.safetensors").is_file()
    flags = ["--episodes", "2", "--headline-episode", "2", "--resamples", "20"]
    assert main(["vintix", "evaluate", str(out), *flags]) == 0
    said = capsys.readouterr().out
    assert "in-context score" in said
    assert "context_reset" in said
    assert (out / "report.html").is_file()
    assert json.loads((out / "evaluation.json").read_text())["command"].startswith("newllm")


@pytest.mark.parametrize("name", config_names())
def test_configs_hold_settings_that_fit_together(name, capsys):
    assert main(["vintix", "train", "x", "--config", name, "--print_config"]) == 0
    settings = VintixSettings(**yaml.safe_load(capsys.readouterr().out))
    given = yaml.safe_load((CONFIGS_FOLDER / f"{name}.yaml").read_text())
    assert {key: getattr(settings, key) for key in given} == {key: pytest.approx(value) for key, value in given.items()}
    for check in (settings.check_collect, settings.check_model, settings.check_train, settings.check_evaluate):
        check()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "nowhere"], "nowhere"),
        (["evaluate", "nowhere"], "nowhere: no such folder"),
        (["train", "x", "--hidden-size", "30"], "--hidden-size is 30"),
        (["train", "x", "--seeds", "1", "1"], "each seed only once"),
        (["train", "x", "--stepz", "1"], "--steps"),
        (["train", "x", "--config", "tinny"], "tinny"),
        (["evaluate", "x", "--headline-episode", "99"], "--headline-episode is 99"),
    ],
)
def test_what_is_wrong_takes_one_line(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["vintix", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_bench_prints_a_table_and_a_json_line(capsys):
    small = ["--hidden-size", "16", "--num-layers", "1", "--intermediate-size", "8", "--context", "16"]
    assert main(["bench", "vintix", *small, "--environments", "2", "--rounds", "1", "--steps", "2"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["steps_read"] for row in result["rows"]] == [16, 32, 64]
    assert result["cache_bytes"] == 2 * 2 * 16 * 16 * 4
