"""The first phase of a diverse projection: what it trains and says, and that an interruption changes nothing."""

import dataclasses
import json
import signal

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from newllm.data import prepare
from newllm.data.corpora import open_corpus
from newllm.errors import UserError
from newllm.experiments.compare import compare
from newllm.experiments.report.projection import cells
from newllm.experiments.results import read_results
from newllm.models import load_model
from newllm.models.projection import oacd_loss
from newllm.resolution import resolve
from newllm.settings import DataSettings, ExperimentSettings, RunSettings
from newllm.training import new_model, train
from newllm.training.projection import ProjectionTrainer, held_out, held_out_windows, stream


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    document = next(iter(open_corpus(DataSettings()).documents()))
    for part in range(3):
        (folder / f"act{part}.txt").write_text(document.text[part * 20_000 : (part + 1) * 20_000])
    return folder


def tiny(text, **changes):
    shape = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 64, "vocab_size": 300}
    values = {"seq_length": 32, "batch_size": 4, "lr": 0.003, "evaluations": 1, "samples": 16, "epochs": 1}
    values |= {"projection_tokens": 5000, "projection_batch": 500, "projection_iterations": 4}
    values |= {"checkpoint_minutes": 0.0}
    common = {"data": str(text), "cache_dir": str(text.parent / "cache"), "precision": "float32", "threads": 1}
    common |= {"validation_share": 0.3, "test_share": 0.3}
    return resolve(RunSettings(**shape | values | common | {"model": "dproj"} | changes))


def run(settings, folder, on_progress=None):
    return train(settings, prepare(settings), folder, on_progress)


def result(folder):
    return json.loads((folder / "result.json").read_text())


def initial_model(settings):
    torch.manual_seed(settings.seed)
    return new_model(settings, prepare(settings))


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A finished run, and the progress it made."""
    folder, seen = tmp_path_factory.mktemp("whole") / "run", []
    run(tiny(text), folder, seen.append)
    return folder, seen


def test_a_run_folder_keeps_the_curve_and_the_result(text, whole):
    folder, seen = whole
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml", "metrics.jsonl", "model", "projection", "result.json",
    ]  # fmt: skip
    assert [path.name for path in (folder / "projection").iterdir()] == ["metrics.jsonl"]
    said = result(folder)["projection"]
    assert said["curve"] == [
        json.loads(line) for line in (folder / "projection/metrics.jsonl").read_text().splitlines()
    ]
    assert (said["iterations"], said["tokens"], said["size"]) == (4, 5000, 20)
    assert said["curve"][0]["change"] == pytest.approx(1, abs=1e-3)  # from zero to a vector of mean square 1
    changes = [line["change"] for line in said["curve"][1:]]
    assert changes == sorted(changes, reverse=True)
    first = [p for p in seen if p.phase == "projection"]
    assert [p.step for p in first] == list(range(1, 41))
    assert {p.total_steps for p in first} == {40}
    assert [p.phase for p in seen[40:]] == [""] * 4


def test_the_first_phase_trains_the_cell_alone_and_the_second_leaves_it(text, tmp_path):
    settings = tiny(text)
    model, before = initial_model(settings), initial_model(settings).state_dict()
    folder = tmp_path / "projection"
    folder.mkdir()
    ProjectionTrainer(model, settings, prepare(settings), folder, None).run()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("cell."), name
    between = model.state_dict()
    run(settings, tmp_path / "run")
    for name, value in load_model(tmp_path / "run").state_dict().items():
        assert torch.equal(value, between[name]) == name.startswith("cell."), name


def test_an_iteration_is_the_plain_one_over_the_stream(text, tmp_path):
    """In one go over all batches with the projections of the pass before, one word after the other."""
    settings = tiny(text, projection_noise=0.0, projection_clip=0.0, projection_tokens=1300)
    data, model = prepare(settings), initial_model(settings)
    trainer = ProjectionTrainer(model, settings, data, tmp_path, None)
    curve = [trainer.iterate()]
    trainer.curve = curve
    curve.append(trainer.iterate())

    model = initial_model(settings)
    ids = torch.from_numpy(data.splits["train"].ids[:1000].astype(np.int64))
    starts = data.splits["train"].document_starts
    optimizer = torch.optim.Adam(model.cell.parameters(), lr=settings.projection_lr)
    kept = torch.zeros(1000, 20)
    for line in curve:
        losses, new = [], kept.clone()
        for batch in (range(500), range(500, 1000)):
            lagged = torch.stack([kept[t - 1] if t and t not in starts else torch.zeros(20) for t in batch])
            e = F.layer_norm(model.embed(ids[batch[0] : batch[-1] + 1]), (32,))
            projections = model.cell(lagged, model.cell.drive(e.detach()))
            loss = oacd_loss(projections, settings.projection_mean_weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            new[batch[0] : batch[-1] + 1] = projections.detach()
        change = (new - kept).square().mean(dim=1)
        assert line["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
        assert line["change"] == pytest.approx(change.mean().item(), rel=1e-3)
        assert line["converged"] == pytest.approx((change < 0.03).float().mean().item(), abs=0.01)
        kept = new.bfloat16().float()


def interrupt_at(moments):
    """Ctrl-C after these steps, each once."""
    left = list(moments)

    def on_progress(progress):
        if left and (progress.phase, progress.step) == left[0]:
            left.pop(0)
            signal.raise_signal(signal.SIGINT)

    return on_progress


@pytest.mark.parametrize("memory", [1.0, 0.0])
def test_interrupted_anywhere_and_called_again_it_ends_bit_for_bit_the_same(text, whole, tmp_path, memory):
    """In the first iteration, in a later one, at the last batch, in the second phase; states in memory and on disk."""
    settings = tiny(text, lagged_memory=memory)
    moments = [("projection", 7), ("projection", 25), ("projection", 40), ("", 1), ("", 3)]
    on_progress = interrupt_at(moments)
    for _ in moments:
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path / "run", on_progress)
    run(settings, tmp_path / "run", on_progress)
    ours, theirs = (result(folder)["projection"] for folder in (tmp_path / "run", whole[0]))
    for line in [*ours["curve"], *theirs["curve"], ours, theirs]:
        line["seconds"] = 0
    assert ours == theirs
    saved = [folder / "model" / "model.safetensors" for folder in (tmp_path / "run", whole[0])]
    assert saved[0].read_bytes() == saved[1].read_bytes()
    assert [path.name for path in (tmp_path / "run" / "projection").iterdir()] == ["metrics.jsonl"]


def test_it_ends_when_enough_tokens_have_converged(text, tmp_path):
    settings = tiny(text, projection_tolerance=1.2, projection_target=0.5, projection_iterations=30)
    run(settings, tmp_path / "run")
    said = result(tmp_path / "run")["projection"]
    assert said["reached_target"]
    assert said["iterations"] < 30
    assert [line["converged"] >= 0.5 for line in said["curve"]] == [False] * (said["iterations"] - 1) + [True]


def test_a_stream_is_cut_into_batches_and_knows_where_documents_begin(text):
    settings = tiny(text, projection_tokens=3333)
    tokens = prepare(settings).splits["train"]
    ids, begins = stream(tokens, settings)
    assert ids.shape == begins.shape == (6, 500)
    assert ids.reshape(-1).tolist() == tokens.ids[:3000].tolist()
    assert begins.reshape(-1).nonzero()[0].tolist() == [start for start in tokens.document_starts if start < 3000]
    assert stream(tokens, dataclasses.replace(settings, projection_batch=9999))[0].shape == (1, 3333)
    assert stream(tokens, dataclasses.replace(settings, max_tokens=1200))[0].shape == (2, 500)


def test_held_out_figures_are_those_of_true_recurrence(text):
    settings = tiny(text)
    model = initial_model(settings)
    windows = held_out_windows(prepare(settings).splits["validation"], settings)
    assert windows.shape == (15, 32)
    figures = held_out(model, windows, settings)
    assert 1 < figures.effective_rank <= 20
    assert 1 < figures.passes <= 32
    strict = held_out(model, windows, dataclasses.replace(settings, projection_tolerance=1e-30))
    assert figures.passes < strict.passes <= 32
    never = held_out(model, windows, dataclasses.replace(settings, projection_tolerance=-1.0))  # as rounding might
    assert never.passes == 32


@pytest.mark.parametrize("cell", ["random", "learned"])
def test_the_other_cells_have_no_first_phase(text, tmp_path, cell):
    settings = tiny(text, model=f"dproj:cell={cell}")
    run(settings, tmp_path / "run")
    assert "projection" not in result(tmp_path / "run")
    before, after = initial_model(settings).cell, load_model(tmp_path / "run").cell
    assert torch.equal(before.recurrent, after.recurrent) == (cell == "random")


def test_a_loss_that_is_not_finite_names_its_setting(text, tmp_path):
    with pytest.raises(UserError, match=r"loss of the projection is (nan|inf) in iteration .*--projection-lr"):
        run(tiny(text, projection_lr=1e37), tmp_path / "run")


@pytest.mark.timeout(60)
def test_a_cell_that_its_last_step_has_spoiled_is_told(text, tmp_path):
    """The loss before it was finite."""
    with pytest.raises(UserError, match=r"^dproj: the cell of the projection .* not finite .*--projection-lr$"):
        run(tiny(text, projection_lr=1e37, projection_tokens=500, projection_iterations=1), tmp_path / "run")


def test_its_settings_count_only_where_they_are_set():
    plain = resolve(RunSettings())
    assert plain.hash() == dataclasses.replace(plain, projection_lr=0.003).hash()
    assert plain.hash() != dataclasses.replace(plain, projection_lr=0.01).hash()
    with pytest.raises(UserError, match="--projection-batch is 0: it must be greater than 0"):
        resolve(RunSettings(projection_batch=0))


def test_a_comparison_reports_the_first_phase(text, tmp_path):
    values = {name: value for name, value in dataclasses.asdict(tiny(text)).items() if name not in ("model", "seed")}
    values |= {"sliding_window": 64, "sliding_stride": 32, "efficiency": False, "eval_tokens": 500, "jobs": 1}
    settings = ExperimentSettings(**values, models=["pythia", "dproj"], out=str(tmp_path / "out"))
    report = compare(settings)
    results = read_results(report.parent)
    by_model = {row["model"]: row["projection"] for row in results["rows"]}
    assert by_model["pythia"] is None
    assert by_model["dproj"]["iterations"] == 4
    count = sum(parameter.numel() for parameter in initial_model(tiny(text)).parameters())
    assert [row["parameters"] for row in results["rows"] if row["model"] == "dproj"] == [count]
    for name in ("report.html", "report.md"):
        written = (report.parent / name).read_text()
        assert "Diverse projection" in written
        assert "dproj: 4 iterations over 5,000 tokens" in written
        assert "All weights, embeddings included, also frozen ones" in written
    assert "plot-projection" in report.read_text()


def test_a_table_of_several_seeds_gives_intervals(whole):
    one = result(whole[0])["projection"]
    other = one | {"iterations": 6, "converged": one["converged"] + 0.1}
    assert cells([one])[0] == "4"
    assert cells([one, other])[0] == "5.0\u00a0±\u00a012.7"
    assert cells([one, one])[3].endswith(" of 20")
