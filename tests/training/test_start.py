"""Runs that start from a trained model: what they begin with, what is refused, and what the report says."""

import dataclasses
import json
import math
import signal

import pytest
import torch
from logits import max_logit_difference
from tiny_runs import SHAPE, STEP, metrics, run, tiny
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from newllm.cli import main
from newllm.commands.adapt import settings_for
from newllm.data import prepare
from newllm.errors import UserError
from newllm.evaluation.checks import CHECK_SHAPE
from newllm.experiments.results import read_results
from newllm.models import create_model, load_model
from newllm.models.interop import load_trained, trained_shape
from newllm.settings import RunSettings
from newllm.training import check_suitability, start
from newllm.training.checkpoints import checkpoints, read_result
from newllm.training.run import new_model
from newllm.training.start import layer_by_layer, misses, start_from

GEOMETRIC = "position.type=alibi,position.slopes=geometric"
FEW = ["--max-tokens", str(2 * STEP), "--evaluations", "1", "--jobs", "1", "--efficiency", "false"]


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "alibi"
    return folder, run(tiny(text, model=f"pythia:{GEOMETRIC}", precision="float32"), folder)


def test_adapt_starts_where_the_trained_model_has_ended(trained, tmp_path, capsys):
    folder, result = trained
    full = f"mla:kv_dim=32,{GEOMETRIC}"
    beside = f"infini_adapter:segment_length=8,{GEOMETRIC}"
    models = [f"pythia:{GEOMETRIC}", full, f"mla:kv_dim=2,{GEOMETRIC}", "infini:segment_length=8", beside]
    out = tmp_path / "out"
    # The text, its windows and the size are those of the run; the scale's are not.
    assert main(["adapt", str(folder), "--models", *models, "--out", str(out), "--precision", "float32", *FEW]) == 0
    rows = {row["model"]: row for row in read_results(out)["rows"]}
    start = {model: row["start"]["val_loss"] for model, row in rows.items()}
    assert start[models[0]] == pytest.approx(result.best_val_loss, abs=1e-6)
    assert start[full] == pytest.approx(result.best_val_loss, abs=1e-4), "nothing was left out"
    assert start[models[2]] != pytest.approx(start[full], abs=1e-5)
    assert rows[models[3]]["start"]["own"] == rows[beside]["start"]["own"] == ["layers.0.beta"]
    assert start[beside] == start[models[0]]
    assert rows[beside]["memories"]["layers"][0]["gates"][0] != 0, "two steps have moved it"
    assert rows[full]["curve"][0] == {"step": 0, "tokens": 0, "val_loss": start[full]}
    said = (out / "report.md").read_text()
    assert "- Started from: alibi; validation perplexity before training: pythia:position.type=alibi" in said
    assert main(["adapt", str(folder), "--models", *models, "--out", str(out), "--precision", "float32", *FEW]) == 0
    assert capsys.readouterr().out.count("kept from before") == 5


def test_distillation_brings_other_layers_nearer_and_leaves_the_rest(text, tmp_path):
    settings = tiny(text, model="mqa", start_from=str(tmp_path), max_tokens=STEP, precision="float32")
    data = prepare(settings)
    source = new_model(dataclasses.replace(settings, model="pythia"), data).eval()
    with torch.no_grad():
        for parameter in source.parameters():  # as if it had learnt much
            parameter += 0.2 * torch.randn_like(parameter)
    source.save_pretrained(tmp_path)
    data.tokenizer.save_pretrained(tmp_path)
    ids = torch.from_numpy(data.splits["test"].ids[None, :32].astype("int64"))
    models, errors, starts = [], [], []
    for tokens in (0, 60 * STEP):
        models.append(new_model(settings, data))
        starts.append(start_from(models[-1], dataclasses.replace(settings, distil_tokens=tokens), data))
        with torch.no_grad():
            pairs = zip(models[-1].layers, layer_by_layer(source, ids, settings), strict=True)
            given = [(layer(x, positions=torch.arange(32)[None], mask=None, state=None), y) for layer, (x, y) in pairs]
            errors.append(sum(float((a - y).square().mean()) for a, y in given))
    assert errors[1] < 0.7 * errors[0]
    assert starts[1].undistilled_val_loss == starts[0].val_loss != starts[1].val_loss
    moved = {n for n, p in models[1].named_parameters() if not torch.equal(p, models[0].get_parameter(n))}
    assert moved == {n for n, _ in models[1].named_parameters() if n.startswith("layers.")}
    for name in ("pythia", "infini_adapter:segment_length=8"):  # the same, and what computes the same
        same = new_model(dataclasses.replace(settings, model=name), data)
        start = start_from(same, dataclasses.replace(settings, distil_tokens=STEP), data)
        assert start.val_loss == start.undistilled_val_loss
        assert all(torch.equal(p, same.get_parameter(n)) for n, p in source.named_parameters())
        assert not any(gate.any() for layer in same.layers for gate in layer.gate_parameters())


@pytest.mark.parametrize(
    ("name", "passes"), [("pythia", 1), ("continuous", 1), ("continuous_extra", 2), ("discrete_extra", 2)]
)
def test_what_a_layer_reads_is_the_whole_text_in_each_pass_however_often_it_is_called(name, passes):
    model, ids = create_model(name, **CHECK_SHAPE), torch.randint(61, (3, 7))
    read = layer_by_layer(model, ids, RunSettings(precision="float32"))
    positions = torch.arange(7).expand(3 * passes, 7)
    for layer, (x, y) in zip(model.layers, read, strict=True):
        assert x.shape == y.shape == (3 * passes, 7, 64)
        with torch.no_grad():
            torch.testing.assert_close(layer(x, positions=positions, mask=None, state=None), y)


def test_an_interruption_changes_neither_the_weights_nor_what_the_run_began_with(trained, text, tmp_path, monkeypatch):
    """Once in distillation, which begins anew, and once in training, which goes on from where it was, alone."""
    folder, _ = trained
    budget = {"max_tokens": 6 * STEP, "distil_tokens": 6 * STEP}
    settings = tiny(text, model=f"mla:kv_dim=8,{GEOMETRIC}", start_from=str(folder), **budget)
    run(settings, tmp_path / "whole")
    distilled = []

    def interrupting(*given):
        distilled.append(1)
        if len(distilled) == 4:
            signal.raise_signal(signal.SIGINT)
        return misses(*given)

    monkeypatch.setattr(start, "misses", interrupting)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "run")
    assert len(distilled) == 4
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "run", lambda now: signal.raise_signal(signal.SIGINT) if now.step == 4 else None)
    assert not (tmp_path / "run" / "model").exists()
    assert [path.name for path in checkpoints(tmp_path / "run")][-1] == "checkpoint-5"
    distilled.clear()
    run(settings, tmp_path / "run")
    assert not distilled
    ours, theirs = (tmp_path / name / "model" / "model.safetensors" for name in ("run", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert read_result(tmp_path / "run")["start"] == read_result(tmp_path / "whole")["start"]
    ours, theirs = ([line | {"seconds": 0} for line in metrics(tmp_path / name)] for name in ("run", "whole"))
    assert ours == theirs


def test_a_checkpoint_in_half_precision_is_adapted_in_float32(text, tmp_path):
    """As those of Pythia on the hub are."""
    settings = tiny(text, model="mqa", start_from=str(tmp_path), distil_tokens=STEP)
    data = prepare(settings)
    new_model(dataclasses.replace(settings, model="pythia"), data).half().save_pretrained(tmp_path)
    data.tokenizer.save_pretrained(tmp_path)
    model = new_model(settings, data)
    begun = start_from(model, settings, data)
    assert math.isfinite(begun.val_loss)
    assert model.dtype == torch.float32


def test_other_weights_are_another_run(trained, text, tmp_path):
    folder, _ = trained
    settings = tiny(text, model="mqa", start_from=str(folder))
    assert settings.hash() != tiny(text, model="mqa").hash()
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "model.safetensors").write_bytes((folder / "model" / "model.safetensors").read_bytes())
    assert settings.hash() == tiny(text, model="mqa", start_from=str(copy)).hash()
    (copy / "model.safetensors").write_bytes(b"others")
    assert settings.hash() != tiny(text, model="mqa", start_from=str(copy)).hash()


def test_a_checkpoint_in_the_format_of_the_hub_is_adapted(text, tmp_path):
    data = prepare(tiny(text))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    theirs = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=len(data.tokenizer) + 20, **sizes)).eval()
    theirs.save_pretrained(tmp_path / "neox")
    data.tokenizer.save_pretrained(tmp_path / "neox")
    assert trained_shape(tmp_path / "neox") == {key: SHAPE[key] for key in trained_shape(tmp_path / "neox")}
    ids = data.splits["train"].ids[None, :64].astype("int64")
    assert max_logit_difference(load_trained(tmp_path / "neox").eval(), theirs, torch.from_numpy(ids)) < 1e-5
    out, place = tmp_path / "out", ["--data", str(text / "play.txt"), "--cache-dir", str(text / "cache")]
    windows = ["--seq-length", "32", "--sliding-window", "64", "--sliding-stride", "32", "--eval-tokens", "500"]
    models = ["--models", "pythia", "mla_geometric:kv_dim=8"]
    assert main(["adapt", str(tmp_path / "neox"), *place, *windows, *models, "--out", str(out), *FEW]) == 0
    assert [row["start"]["source"] for row in read_results(out)["rows"]] == ["neox"] * 2
    assert load_model(out / "pythia-seed0").config.vocab_size == len(data.tokenizer)


def test_a_checkpoint_whose_mlp_reads_what_attention_has_added_to(text, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=9, use_parallel_residual=False, **sizes)).save_pretrained(tmp_path)
    settings = tiny(text, start_from=str(tmp_path))
    with pytest.raises(UserError, match=r"^mla: layer 0 of the trained model has parallel_residual=false"):
        check_suitability(settings, ["pythia:parallel_residual=false", "mla"])
    models = settings_for(str(tmp_path))["models"]
    assert models == ["pythia:parallel_residual=false", "mqa:parallel_residual=false"]
    check_suitability(settings, models)


def test_what_does_not_fit_is_one_line(trained, text, tmp_path):
    folder, _ = trained
    for changes, message in (
        ({"hidden_size": 64}, "--hidden-size is 64: the model in .* has 32"),
        ({"vocab_size": 290}, "it has another tokenizer than the text: --tokenizer"),
        ({"start_from": str(tmp_path)}, "no model in"),
    ):
        with pytest.raises(UserError, match=message):
            run(tiny(text, **{"model": "mqa", "start_from": str(folder)} | changes), tmp_path / "run")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="nor of a GPT-NeoX"):
        trained_shape(tmp_path)
