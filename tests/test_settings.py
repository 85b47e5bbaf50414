"""Settings from a command line: which budget counts, and that runs of committed results are found again."""

import json
from pathlib import Path

import pytest

from newllm.commands.flags import Parser
from newllm.resolution import resolve
from newllm.settings import BUDGET, CONFIGS_FOLDER, ExperimentSettings

RESULTS = Path(__file__).parents[1] / "docs" / "experiments"


def settings_of(*argv):
    parser = Parser("compare", configs=CONFIGS_FOLDER)
    parser.add_settings(ExperimentSettings)
    return resolve(parser.settings(parser.parse(list(argv))))


def budget(*argv):
    settings = settings_of(*argv)
    return {name: value for name in BUDGET if (value := getattr(settings, name)) is not None}


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("caches", []),
        ("positions", []),
        ("recall", []),
        ("caches_70m", ["--samples", "4000", "--models", "pythia", "mqa", "mla_geometric", "v_dproj"]),
    ],
)
def test_committed_runs_keep_their_hash(name, flags):
    """`compare --reuse docs/experiments/NAME.json` looks for it."""
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    runs = settings_of("--config", name, *flags).runs()
    assert {(row["model"], row["seed"], row["hash"]) for row in rows} <= {
        (run.model, run.seed, run.hash()) for run in runs
    }


def test_a_budget_flag_replaces_the_budget_of_scale_and_config(tmp_path):
    config = tmp_path / "full.yaml"
    config.write_text("max_tokens: 5000\nsamples: 100\nepochs: 2\n")
    complete = ["--config", str(config)]
    assert budget(*complete) == {"max_tokens": 5000, "samples": 100, "epochs": 2}
    assert budget(*complete, "--epochs", "3") == budget("--epochs", "3") == {"epochs": 3}
    assert budget(*complete, "--samples", "7") == budget("--samples", "7") == {"samples": 7, "epochs": 1}
    assert budget(*complete, "--max-tokens", "9") == {"max_tokens": 9}
    assert budget("--config", "caches_70m", "--seq-length", "64") == budget("--config", "caches_70m")
