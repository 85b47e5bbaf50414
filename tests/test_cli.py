"""The command line as a user meets it: help, config files, a small run from training to generated text."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
import yaml

from newllm import __version__, cli
from newllm.cli.bench import BENCHES
from newllm.cli.registry import COMMANDS
from newllm.commands.flags import field_docs
from newllm.commands.generate import GenerateSettings, continue_text
from newllm.data.hub import load_tokenizer
from newllm.evaluation import cache_precision, perplexity
from newllm.experiments.compare import check_models
from newllm.models import meta_model
from newllm.models.factory import preset_names
from newllm.models.layers import LAYER_TYPES
from newllm.resolution import resolve
from newllm.settings import ExperimentSettings, RunSettings

FLAGS = {
    **{
        "hidden-size": 32,
        "num-layers": 1,
        "num-heads": 2,
        "intermediate-size": 64,
        "vocab-size": 300,
        "seq-length": 16,
    },
    **{"max-tokens": 8000, "batch-size": 8, "evaluations": 2, "lr": 0.01, "precision": "float32"},
    **{"sliding-window": 16, "sliding-stride": 8},
}


def flags(**values) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A model trained by `newllm train` on a handful of short documents, with characters of several bytes."""
    folder = tmp_path_factory.mktemp("cli")
    texts = [f"Nº {n}: the naïve café – {n * n} “words” 字 and more words, one after another. " * 6 for n in range(40)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = ["train", "--data", str(folder / "texts.jsonl"), "--cache-dir", str(folder / "cache")]
    assert cli.main([*command, *flags(**FLAGS), "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_alone_it_explains_itself(argv, capsys):
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert re.search(rf"^  {name} ", out, re.MULTILINE)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"newllm {__version__}\n"


def test_what_an_output_cannot_show_ends_no_command(tmp_path):
    """In an encoding of Western Europe there is no ellipsis, and some file names are no text in any."""
    code = "from newllm import cli; code = cli.main(['--help']); print('caf\\udce9'); raise SystemExit(code)"
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert process.returncode == 0, process.stderr
    assert rb"usage: newllm COMMAND [--help] \u2026" in process.stdout
    assert process.stdout.endswith(rb"caf\udce9" + b"\n")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_examples(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([*name.split(), "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: newllm {name}" in out
    assert f"examples:\n  newllm {name}" in out


def test_every_benchmark_has_what_measures_it():
    for bench in BENCHES.values():
        assert callable(resolve_name(bench.run))


def test_a_group_lists_its_commands(capsys):
    assert cli.main(["data"]) == 0
    out = capsys.readouterr().out
    assert "data prepare" in out
    assert "data show" in out


def test_every_setting_is_a_described_flag(capsys):
    with pytest.raises(SystemExit):
        cli.main(["compare", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    docs = field_docs(ExperimentSettings)
    for field in dataclasses.fields(ExperimentSettings):
        assert f"--{field.name.replace('_', '-')} " in out
        assert docs[field.name] in out


def test_help_imports_no_torch():
    code = (
        "import sys; from newllm.cli import COMMANDS, main\n"
        "for name in ['', *COMMANDS]:\n"
        "    try: main([*name.split(), '--help'])\n"
        "    except SystemExit: pass\n"
        "    slow = {'torch', 'transformers', 'datasets', 'plotly', 'pandas', 'rich', 'numpy'} & set(sys.modules)\n"
        "    if slow: sys.exit(f'{name}: imported {slow}')"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_help_names_the_configs_of_experiments_where_they_can_be_read(capsys):
    """And nowhere else: `newllm train` cannot read what says which models to compare."""
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([*name.split(), "--help"])
        assert ("context_remedies" in capsys.readouterr().out) == (name in ("adapt", "compare")), name
    assert printed_config(["compare", "--config", "selective"], capsys)["epochs"] == 0.5
    assert cli.main(["train", "--config", "selective"]) == 2
    assert "--config selective: no such file" in capsys.readouterr().err


def printed_config(argv, capsys) -> dict:
    capsys.readouterr()
    assert cli.main([*argv, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("scale", ["quickstart", "small", "pythia-70m"])
def test_a_printed_config_gives_the_same_config_again(scale, tmp_path, capsys):
    argv = ["compare", "--scale", scale, "--models", "gqa:window=8", "pythia", "--seeds", "3", "1", "--lr", "1e-4"]
    first = printed_config(argv, capsys)
    expected = resolve(ExperimentSettings(scale=scale, models=["gqa:window=8", "pythia"], seeds=[3, 1], lr=1e-4))
    assert first == dataclasses.asdict(expected)
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(first))
    assert printed_config(["compare", "--config", str(tmp_path / "a.yaml")], capsys) == first


def test_where_the_config_is_printed_nothing_begins(capsys):
    assert printed_config(["memory", "show", "no_such.memory", "--threads", "3"], capsys)["threads"] == 3


def test_a_config_may_come_from_a_pipe(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_text, args=("lr: 0.5",)).start()
    assert printed_config(["compare", "--config", str(tmp_path / "pipe")], capsys)["lr"] == 0.5


def test_flags_beat_the_config_wherever_they_stand(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("lr: 1e-4\nmodels: [mqa]\nbatch_size: 3\n")
    config = ["--config", str(tmp_path / "a.yaml")]
    for argv in (["--lr", "0.5", *config], [*config, "--lr", "0.5"]):
        printed = printed_config(["compare", *argv], capsys)
        assert (printed["lr"], printed["models"], printed["batch_size"]) == (0.5, ["mqa"], 3)
    assert printed_config(["compare", *config], capsys)["lr"] == 1e-4


def test_the_help_of_adapt_tells_its_own_defaults(run_folder, capsys):
    with pytest.raises(SystemExit):
        cli.main(["adapt", "--help"])
    told = re.search(r"--models (.*?)--seeds", " ".join(capsys.readouterr().out.split()))[1]
    printed = printed_config(["adapt", str(run_folder)], capsys)
    assert (printed["models"][0], printed["name"]) == ("pythia", "adapt")
    assert all(re.search(rf"\b{model.partition(':')[0]}\b", told) for model in printed["models"][1:])
    assert printed["models"][-2:] == ["infini:segment_length=4", "infini_adapter:segment_length=4"], "windows of 16"
    check_models(ExperimentSettings(**printed | {"num_layers": 2, "start_from": None}))
    assert "pythia_alibi" not in told


@pytest.mark.parametrize("command", ["train", "compare", "adapt"])
def test_interrupt_exits_with_130(command, monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, command, interrupted)
    assert cli.main([command]) == 130
    assert "continues" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (MemoryError("Unable to allocate 7.28 TiB for an array"), "Unable to allocate 7.28 TiB for an array"),
        (MemoryError(), "no more could be had"),
        (
            RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."),
            "can't allocate memory: you tried to allocate 4 bytes.",
        ),
    ],
)
def test_more_than_memory_holds_is_one_line(error, what, monkeypatch, capsys):
    def fail(argv):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    assert cli.main(["train"]) == 2
    expected = f"newllm: error: not enough memory ({what}): choose a smaller model, batch or context\n"
    assert capsys.readouterr().err == expected


def test_a_trained_run_is_complete(run_folder):
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    assert config == dataclasses.asdict(RunSettings(**config))
    assert config["max_tokens"] == 8000
    names = {path.name for path in run_folder.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "model", "result.json"}


def test_evaluation_finds_the_loss_that_training_reported(run_folder, capsys):
    assert cli.main(["evaluate", str(run_folder)]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    reported = json.loads((run_folder / "result.json").read_text())["training"]["best_val_loss"]
    assert result["validation"]["loss"] == pytest.approx(reported, abs=1e-5)
    assert result["test"]["ppl"] < 300
    assert any("bits per byte" in row for row in table)


def test_evaluation_on_another_text_uses_the_models_own_tokenizer(run_folder, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("Words and more words, one after another. \n\n" * 200)
    argv = ["evaluate", str(run_folder), "--data", str(tmp_path / "other.txt"), "--eval-tokens", "200"]
    assert cli.main(argv) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["test"]["tokens"] <= 200


def test_what_cannot_be_measured_is_told_before_anything_is(run_folder, monkeypatch, capsys):
    for module in (perplexity, cache_precision):  # imported before, or the second would keep what replaces the first's
        monkeypatch.setattr(module, "evaluate", lambda *given: pytest.fail("it has measured"))
    argv = ["evaluate", str(run_folder), "--cache-dir", str(run_folder.parent / "cache"), "--tasks", "perplexity"]
    assert cli.main([*argv, "recall"]) == 2
    assert "recall: the training text has only 0 capitalised words" in capsys.readouterr().err


def test_evaluation_through_quantised_caches_is_a_table_and_json(run_folder, capsys):
    assert cli.main(["evaluate", str(run_folder), "--cache-precision", "model", "int8", "int4"]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    rows = json.loads(line)["cache_precision"]
    assert [row["cache_precision"] for row in rows] == ["model", "int8", "int4"]
    reported = json.loads((run_folder / "result.json").read_text())["training"]["best_val_loss"]
    assert rows[0]["validation"]["loss"] == pytest.approx(reported, abs=1e-5)
    assert [row["cache_bytes_per_token"] for row in rows] == [256, 72, 40]
    for name in ("float32", "int8", "int4"):
        assert sum(row.split()[:1] == [name] for row in table) == 2  # in the tables of both splits


def test_check_of_a_trained_model(run_folder, capsys):
    assert cli.main(["check", str(run_folder)]) == 0
    assert "all checks passed" in capsys.readouterr().out


def test_check_fails_with_exit_code_1_and_says_what_is_broken(tmp_path, capsys):
    plugin = tmp_path / "peek.py"
    plugin.write_text(
        "import torch\n"
        "from newllm.models.layers import Layer, register_layer\n"
        "@register_layer('peek')\n"
        "class Peek(Layer):\n"
        "    def __init__(self, hidden_size, num_heads, intermediate_size):\n"
        "        super().__init__()\n"
        "    def forward(self, x, *, positions, mask, state=None):\n"
        "        return x + x.roll(-1, dims=1)\n"
    )
    assert cli.main(["check", "--plugin", str(plugin)]) == 1
    out = capsys.readouterr().out
    assert re.search(r"FAILED +future +leaks the future", out)
    assert "broken: peek" in out


def generated(argv, capsys) -> str:
    capsys.readouterr()
    assert cli.main(["generate", *argv]) == 0
    return capsys.readouterr().out


def test_generation_repeats_with_its_seed_and_begins_with_the_prompt(run_folder, capsys):
    argv = [str(run_folder), "--prompt", "the naïve", "--max-new-tokens", "20"]
    text = generated(argv, capsys)
    assert text.startswith("the naïve")
    assert text.endswith("\n")
    assert text == generated(argv, capsys)
    assert text != generated([*argv, "--seed", "1"], capsys)
    greedy = [*argv, "--temperature", "0"]
    assert generated(greedy, capsys) == generated([*greedy, "--seed", "5"], capsys)


def test_text_is_streamed_and_characters_are_never_cut(run_folder):
    tokenizer = load_tokenizer(str(run_folder / "model"))
    continuation = " 字 – naïve 🙂"
    shown: list[str] = []

    class Output(io.StringIO):
        def flush(self):
            shown.append(self.getvalue())

    class Scripted:
        """Stands for a model that writes a given text, token by token."""

        device = "cpu"

        def generate(self, ids, streamer, **options):
            streamer.put(ids)
            for token in tokenizer.encode(continuation):
                streamer.put(torch.tensor([token]))
            streamer.end()

    continue_text(Scripted(), tokenizer, "a “b”", GenerateSettings(), Output())
    assert shown[-1] == f"a “b”{continuation}\n"
    assert len(set(shown)) > 5
    assert not any("\ufffd" in text for text in shown)


def test_prompt_from_a_pipe_and_conversation(run_folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("café\n".encode())))
    argv = [str(run_folder), "--max-new-tokens", "3"]
    assert generated(argv, capsys).startswith("café")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\ufeffa\r\nb\r\n".encode())))
    assert generated(argv, capsys).startswith("a\nb"), "as a text file is read"

    monkeypatch.setattr("sys.stdin", Terminal("one\ntwo\n\nthree\n"))
    text = generated(argv, capsys)
    assert "one" in text
    assert "two" in text
    assert "three" not in text


def test_any_preset_generates_and_says_that_it_is_untrained(run_folder, capsys):
    cache = ["--cache-dir", str(run_folder.parent / "cache"), "--data", str(run_folder.parent / "texts.jsonl")]
    shape = {key: FLAGS[key] for key in ("hidden-size", "num-layers", "num-heads", "vocab-size", "seq-length")}
    assert cli.main(["generate", "mqa", "--prompt", "a", "--max-new-tokens", "4", *cache, *flags(**shape)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("a")
    assert "'mqa' is untrained" in captured.err


def test_data_show(run_folder, capsys):
    folder = run_folder.parent
    argv = ["data", "show", "--data", str(folder / "texts.jsonl"), "--cache-dir", str(folder / "cache")]
    assert cli.main([*argv, *flags(**{"vocab-size": 300, "seq-length": 16})]) == 0
    out = capsys.readouterr().out
    assert "byte-level BPE of 300 words" in out
    assert "the naïve café" in out


def test_models_lists_every_model_and_explains_one(capsys):
    assert cli.main(["models"]) == 0
    listed = capsys.readouterr().out
    assert all(re.search(rf"^{name} +\w", listed, re.M) for name in preset_names())
    assert cli.main(["models", "mla:kv_dim=64"]) == 0
    told = capsys.readouterr().out
    assert "6 × mla (kv_dim=64)" in told
    assert f"{meta_model('mla:kv_dim=64').num_parameters():,} parameters" in told
    assert all(f"{option}=" in told for option in ("kv_dim", "position", "rope_dim", "path"))
    assert "r, the width of the latent" in told
    assert cli.main(["models", "continuous_fuse"]) == 0
    told = capsys.readouterr().out
    assert "input=fuse, feedback=state, extra_passes=0, use_h1=False" in told
    assert "the head reads a learned combination of first and last pass" in told


@pytest.mark.parametrize("name", preset_names())
def test_every_option_that_models_names_is_explained(name, capsys):
    assert cli.main(["models", name]) == 0
    titles, told = [], capsys.readouterr().out
    for title in re.findall(r"^(?:Every model|Layer type .*|.*, the model): (.*)$", told, re.M):
        titles += re.findall(r"(\w+)=", re.sub(r"\{.*?\}", "", title))
    assert len(titles) > 5
    assert [option for option in titles if not re.search(rf"^ {{8}}(\w+, )*{option}(, \w+)*:", told, re.M)] == []


@pytest.fixture
def _forget_my_layer():
    yield
    LAYER_TYPES.pop("my_layer", None)


@pytest.mark.usefixtures("_forget_my_layer")
def test_models_of_a_plugin_are_listed(capsys):
    plugin = str(Path(__file__).parents[1] / "examples" / "my_layer.py")
    assert cli.main(["models", "--plugin", plugin]) == 0
    assert re.search(r"^my_layer ", capsys.readouterr().out, re.M)
    assert cli.main(["models", "my_layr", "--plugin", plugin]) == 2
    assert "did you mean 'my_layer'?" in capsys.readouterr().err
