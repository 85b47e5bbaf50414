"""Every experiment's command, from nothing to its report, with a budget of 20,000 tokens. `make test-experiments`."""

import pytest
import yaml

from newllm.cli import main
from newllm.commands.flags import config_names
from newllm.experiments.results import read_results
from newllm.settings import CONFIGS_FOLDER

pytestmark = [pytest.mark.experiments, pytest.mark.timeout(1800)]

# The text, its vocabulary and the budget are real; models are small and little is measured, so that all experiments
# together take minutes. Recall keeps its shape: its models name sizes that must divide it.
SMALL = {"hidden-size": 64, "num-layers": 2, "num-heads": 2, "intermediate-size": 64}
QUICK = {
    "max-tokens": 20_000,
    "seeds": 0,
    "jobs": 1,
    "threads": 1,
    "evaluations": 1,
    "eval-tokens": 600,
    "seq-length": 128,
    "position-window": 128,
    "sliding-window": 64,
    "sliding-stride": 32,
    "efficiency": "false",
    "precision": "float32",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("name", config_names(CONFIGS_FOLDER))
def test_the_command_of_an_experiment_leads_to_its_report(name, cache, tmp_path, capsys):
    config = yaml.safe_load((CONFIGS_FOLDER / f"{name}.yaml").read_text())
    flags = QUICK | {"cache-dir": cache, "out": tmp_path / "out"}
    if config.get("recall_share"):
        flags |= {"seq-length": config["seq_length"], "recall-windows": 4}
    else:
        flags |= SMALL
    if config.get("name") == "Compressive memories":  # whose windows must hold several segments
        flags |= {"seq-length": config["seq_length"]}
    if config.get("projection_iterations"):
        flags |= {"projection-iterations": 2}
    main(["compare", "--config", name, *(str(part) for key, value in flags.items() for part in (f"--{key}", value))])
    results = read_results(tmp_path / "out")
    assert [row["model"] for row in results["rows"]] == config["models"], capsys.readouterr().err
    assert results["failed"] == []
    assert all(row["tokens"] <= 20_000 for row in results["rows"])
    assert (tmp_path / "out" / "report.html").stat().st_size > 100_000
