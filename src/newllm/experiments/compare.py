"""The main job: several models on the same text under the same budget, then one report.

Everything that can be wrong with the input is found before anything trains. Each run is stored when it is done, and
results.json and the report are written anew after each, so that an interrupted comparison is readable, and continues.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from newllm import __version__
from newllm.data import prepare
from newllm.data.recall import RecallDataset
from newllm.data.reversal import ReversalTask
from newllm.devices import machine_info, prepare_process, resolve_device, resolve_precision
from newllm.errors import UserError
from newllm.evaluation.efficiency import KEYS as EFFICIENCY
from newllm.evaluation.efficiency import measure_all
from newllm.experiments.command_line import command_line
from newllm.experiments.jobs import Task, Workers, finish_here, resolve_jobs
from newllm.experiments.progress import Display, duration
from newllm.experiments.report import check_shown_row, write_report
from newllm.experiments.results import FILE_NAME, Results, check_taken_row, finite, read_results, write_results
from newllm.experiments.run import RunError, error_line, is_finished, with_details
from newllm.experiments.terminal import print_table, table_console
from newllm.models import load_plugin, meta_model
from newllm.paths import spelt_alike, user_path
from newllm.resolution import resolve
from newllm.settings import ExperimentSettings, LaggedSettings, Precision, RunSettings
from newllm.training import check_loggers, check_suitability, new_model
from newllm.training.checkpoints import (
    ERROR_FILE,
    claim_run_folder,
    file_name,
    make_folder,
    read_object,
    read_result,
    set_aside,
    write_whole,
)
from newllm.training.locks import lock

if TYPE_CHECKING:
    from newllm.data import PreparedData


EFFICIENCY_FILE = "efficiency.json"  # measured speed and memory, which are kept


def compare(settings: ExperimentSettings) -> Path:
    """Trains, evaluates and measures every model with every seed; returns the path of report.html.

    Started again with the same folder, finished runs are kept and an unfinished one continues. A run that fails is
    recorded under "failed" in results.json and the others go on; if all fail, that is an error (RunError; UserError
    where the first says what to change).
    """
    settings = resolve(settings)
    resolve_device(settings.device)
    check_loggers(settings)
    jobs, threads = resolve_jobs(settings)
    prepare_process(settings.threads)
    check_models(settings)
    out = resolve_out(settings)
    make_folder(out)
    refuse_other_folder(out)
    refuse_other_precision(out, settings)
    console = table_console()
    earlier = [(path, read_results(user_path(path))) for path in settings.reuse] + taken_before(out)
    runs = planned_runs(settings)
    with lock(out), Display(console, len(runs)) as display:
        data = prepare(settings, display.say)
        if settings.recall_share:  # what cannot be measured is told before anything trains
            RecallDataset(data, settings, seed=0).task.check_evaluation(settings.recall_distances)
        if settings.reversal_share:
            ReversalTask(data)
        comparison = Comparison(settings, runs, out, data, display, jobs)
        tasks = comparison.reuse(earlier, comparison.keep_finished())
        if jobs == 1:
            for task, outcome in finish_here(tasks, data, display):
                comparison.add(task, outcome)
        else:
            with Workers(jobs, threads, data, display) as workers:
                for task, outcome in workers.finish(tasks):
                    comparison.add(task, outcome)
        if not comparison.rows:
            raise comparison.nothing_to_report()
        comparison.write()
        if settings.efficiency:
            display.busy("measuring speed and memory, one model at a time")
            comparison.add_efficiency()
    console.print()
    print_table(comparison.results(), console)
    return out / "report.html"


def resolve_out(settings: ExperimentSettings) -> Path:
    """The compare folder: --out, or runs/NAME-SCALE. Absolute, since `.` and `..` have no name to put a lock beside."""
    default = f"runs/{file_name(f'{settings.name}-{settings.scale}')}"
    return user_path(settings.out or default).resolve()


def run_folder(out: Path, run: RunSettings) -> Path:
    return out / file_name(f"{run.model}-seed{run.seed}")


def refuse_other_folder(out: Path) -> None:
    """Raises UserError for a folder in which a comparison would replace what no comparison has written.

    Anything else may stand there beside it.
    """
    if (out / FILE_NAME).exists():
        read_results(out)
    elif read_result(out):
        raise UserError(f"--out {out} is the folder of a run: choose another folder")
    elif other := [path.name for path in (*shown_files(out), out / EFFICIENCY_FILE) if path.exists()]:
        raise UserError(f"--out {out} holds a {other[0]} of something else: choose another folder")
    for path in shown_files(out):
        if path.is_dir():
            raise UserError(f"--out {out}: {path.name} is a folder there: choose another folder")


def refuse_other_precision(out: Path, settings: ExperimentSettings) -> None:
    """Raises UserError where the folder's runs were computed in what --precision auto was on another machine: beside
    them, or continued from them, ours would be others by their arithmetic, and the results would not say so."""
    if settings.precision != "auto" or not (out / FILE_NAME).is_file():
        return
    results, ours = read_results(out), {"settings": {"device": settings.device}, "machine": machine_info()}
    here, there = computed_in(ours), computed_in(results)
    if results["settings"].get("precision") == "auto" and there != here:
        raise UserError(
            f"--out {out}: its runs were computed in {there}, which --precision auto was on that machine; here it is "
            f"{here}: choose another folder, with --precision {there} --reuse {out} to take over what is finished"
        )


def taken_before(out: Path) -> list[tuple[str, Results]]:
    """What this folder has taken over from elsewhere: such rows have no run folder here, and are kept like the others,
    also by a command that no longer says where they came from."""
    if not (out / FILE_NAME).is_file():
        return []
    results = read_results(out)
    rows = [row for row in results["rows"] if row.get("reused")]
    return [(str(out), results | {"rows": rows})] if rows else []


def shown_files(out: Path) -> list[Path]:
    """What a comparison shows: its results, and the reports made of them."""
    return [out / FILE_NAME, out / "report.html", out / "report.md"]


def check_models(settings: ExperimentSettings) -> None:
    """Raises UserError for a model that cannot be built, or cannot be trained so, before anything trains."""
    if settings.plugin is not None:
        load_plugin(settings.plugin)
    for model in settings.models:
        meta_model(model, **settings.shape())
    check_suitability(settings, settings.models)


def planned_runs(settings: ExperimentSettings) -> list[RunSettings]:
    """The runs of a comparison. How states are trained is told to models that feed one back, and to no others: what
    another model computes does not depend on it, and so its run can be taken over whatever the comparison says."""
    idle = dataclasses.asdict(LaggedSettings())
    recurrent = {model: meta_model(model, **settings.shape()).state_size > 0 for model in settings.models}
    return [run if recurrent[run.model] else dataclasses.replace(run, **idle) for run in settings.runs()]


class Comparison:
    """The runs so far, and the files that show them."""

    def __init__(
        self,
        settings: ExperimentSettings,
        runs: list[RunSettings],
        out: Path,
        data: PreparedData,
        display: Display,
        jobs: int,
    ) -> None:
        self.settings, self.runs, self.out, self.data = settings, runs, out, data
        self.display, self.jobs = display, jobs
        self.created = datetime.now(UTC).isoformat(timespec="seconds")
        self.row_of: dict[int, dict[str, Any]] = {}  # by the run's place in runs
        self.error_of: dict[int, Exception] = {}
        self.kept_earlier = False

    @property
    def rows(self) -> list[dict[str, Any]]:
        """In the order of the settings, whichever run ended first."""
        return [self.row_of[index] for index in sorted(self.row_of)]

    def keep_finished(self) -> list[Task]:
        """Takes the rows of finished runs from their folders; returns the runs that are still to be done."""
        tasks = []
        for index, run in enumerate(self.runs):
            folder = run_folder(self.out, run)
            result = read_result(folder)
            if is_finished(result, run) and result.get("data") == self.data.fingerprint:
                with lock(folder):
                    claim_run_folder(folder, run, self.data.fingerprint)
                check_taken_row(result["row"], where := f"{folder / 'result.json'}: row")
                check_shown_row(result["row"], where)
                (folder / ERROR_FILE).unlink(missing_ok=True)
                self._add_row(index, run, result["row"], ", kept from before")
            else:
                tasks.append(Task(index, run, folder))
        return tasks

    def reuse(self, earlier: list[tuple[str, Results]], tasks: list[Task]) -> list[Task]:
        """Takes rows of the same settings and text from earlier comparisons; returns the runs that are in none of them.

        The text is the same where what is said of it is: its name, its tokenizer, and documents, bytes and tokens of
        every split. The precision must be the same too, which 'auto' may have made another there: a difference to such
        a run would in part be one of arithmetic. A row that is taken says under "reused" where it comes from: time and
        machine are those of that comparison.
        """
        here = resolve_precision(self.settings.precision, resolve_device(self.settings.device))
        for path, results in earlier:
            if not tasks:
                break
            if (there := computed_in(results)) != here:
                self.display.say(
                    f"{path}: its runs were computed in {there}, and those of this comparison are in {here}: with "
                    f"--precision {there} they could be taken over"
                )
                continue
            origin = {"from": spelt_alike(path)} | {key: results[key] for key in ("created", "version", "machine")}
            rows = {row.get("hash"): row for row in results["rows"]} if results["data"] == self.data.info else {}
            found = {task.index: row for task in tasks if (row := _same_run(task.run, rows, "auto", here)) is not None}
            if not found and path in self.settings.reuse:  # and not what this folder has taken over before
                self.display.say(f"{path}: none of its runs has the settings and the text of this comparison")
            for task in tasks:
                if (row := found.get(task.index)) is not None:
                    check_taken_row(row, f"{path}: row")
                    check_shown_row(row, f"{path}: row of {row['model']}, seed {row['seed']}")
                    measured = dict.fromkeys(EFFICIENCY)  # what this machine measures is not mixed with another's
                    self._add_row(task.index, task.run, {"reused": origin} | row | measured, f", from {path}")
            tasks = [task for task in tasks if task.index not in found]
        return tasks

    def add(self, task: Task, outcome: dict[str, Any] | Exception) -> None:
        """Takes in a run that has ended, and writes results and report anew."""
        if isinstance(outcome, Exception):
            self.error_of[task.index] = outcome
            said = with_details(error_line(outcome), task.folder)
            self.display.say(f"{self.display.label(task.index, task.run)}: failed: {said}")
            self.display.run_done()
        else:
            self._add_row(task.index, task.run, outcome)
        self.write()

    def _add_row(self, index: int, run: RunSettings, row: dict[str, Any], remark: str = "") -> None:
        self.row_of[index] = row = finite(row)  # as results.json has it: null where a run has come apart
        ppl = math.inf if row.get("test_ppl") is None else row["test_ppl"]
        self.display.say(
            f"{self.display.label(index, run)}: test perplexity {ppl:.2f}, {row['tokens']:,} tokens "
            f"in {duration(row['seconds'])}{'' if row['valid'] else ', INVALID: it fails a check'}{remark}"
        )
        self.display.run_done()

    def nothing_to_report(self) -> Exception:
        """The error of a comparison in which every run failed."""
        index, first = min(self.error_of.items())
        if isinstance(first, UserError):
            return first
        run = self.runs[index]
        said = with_details(error_line(first), run_folder(self.out, run))
        error = RunError(f"every run failed; {run.model}, seed {run.seed}: {said}")
        error.__cause__ = first
        return error

    def add_efficiency(self) -> None:
        """Measures the models side by side, on one seed's weights: speed and memory do not depend on the seed.

        Kept in efficiency.json for as long as it is about the same models and settings, since it takes a while.
        """
        rows: dict[str, dict[str, Any]] = {}
        for row in self.rows:
            rows.setdefault(row["model"], row)
        key = {
            "runs": {model: row["hash"] for model, row in rows.items()},
            "settings": [self.settings.efficiency_seconds, self.settings.decode_context],
            "machine": machine_info(),
        }
        path = self.out / EFFICIENCY_FILE
        known: dict[str, Any] = {}
        with contextlib.suppress(OSError, UserError):  # none yet, or damaged: it is measured anew
            known = read_object(path, "")
        if known.get("key") != key:
            with tempfile.TemporaryDirectory() as temporary:
                folders = [self._model_to_measure(row, Path(temporary)) for row in rows.values()]
                known = {"key": key, "measured": dict(zip(rows, measure_all(folders, self.settings), strict=True))}
            errors = [
                figures["efficiency_error"] for figures in known["measured"].values() if figures["efficiency_error"]
            ]
            for error in errors:
                self.display.say(f"not measured: {error}")
            if not errors:
                write_whole(path, json.dumps(known, indent=1) + "\n")
        for row in self.rows:
            row |= known["measured"][row["model"]]
        self.write()

    def _model_to_measure(self, row: dict[str, Any], temporary: Path) -> Path:
        """The folder of the run; of a run that was taken from elsewhere one with the same model, untrained."""
        run = self.run_of(row)
        if not row.get("reused"):
            return run_folder(self.out, run)
        folder = run_folder(temporary, run)
        new_model(run, self.data).save_pretrained(folder / "model")
        return folder

    def run_of(self, row: dict[str, Any]) -> RunSettings:
        return next(run for run in self.runs if (run.model, run.seed) == (row["model"], row["seed"]))

    def results(self) -> dict[str, Any]:
        """The content of results.json."""
        return {
            "name": self.settings.name,
            "settings": dataclasses.asdict(self.settings),
            "command": command_line(self.settings),
            "machine": machine_info() | ({"runs_at_a_time": self.jobs} if self.jobs > 1 else {}),
            "data": self.data.info,
            "baseline": self.settings.models[0],
            "created": self.created,
            "version": __version__,
            "rows": self.rows,
            "failed": self.failed(),
        }

    def failed(self) -> list[dict[str, Any]]:
        return [
            {"model": self.runs[index].model, "seed": self.runs[index].seed, "error": error_line(error)}
            for index, error in sorted(self.error_of.items())
        ]

    def write(self) -> None:
        """Results and report, once there is a row: a comparison of which every run fails replaces nothing."""
        if not self.rows:
            return
        self.keep_earlier()
        write_results(self.out, self.results())
        write_report(self.out, checked=True)

    def keep_earlier(self) -> None:
        """Keeps results and report of an earlier comparison in the folder, if it has runs that this one has not."""
        if self.kept_earlier or not (self.out / FILE_NAME).is_file():
            return
        self.kept_earlier = True
        rows = {row.get("hash"): row for row in read_results(self.out)["rows"]}
        ours = [row["hash"] for run in self.runs if (row := _same_run(run, rows)) is not None]
        if rows.keys() - set(ours):
            old, *_ = set_aside(*filter(Path.is_file, shown_files(self.out)))
            self.display.say(f"{self.out} holds a comparison of other runs: kept as {old.name}, with its report")


def computed_in(results: Results) -> str:
    """The precision of an earlier comparison's runs: 'bf16' or 'float32'. Of a GPU bf16 is assumed."""
    settings, machine = results["settings"], results["machine"]
    if (precision := settings.get("precision", "auto")) != "auto":
        return str(precision)
    on_gpu = machine.get("gpu") and settings.get("device") != "cpu"
    return "bf16" if on_gpu or machine.get("native_bf16") else "float32"


def _same_run(
    run: RunSettings, rows: dict[str | None, dict[str, Any]], *precisions: Precision
) -> dict[str, Any] | None:
    """The row of exactly this run; `precisions` are other names that its precision may have there.

    One of our own models is the same whether a plugin with others is loaded or not.
    """
    hashes = (
        dataclasses.replace(run, precision=precision, plugin=plugin).hash()
        for precision in (run.precision, *precisions)
        for plugin in (run.plugin, None)
    )
    return next((rows[key] for key in hashes if key in rows), None)
