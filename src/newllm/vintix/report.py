"""report.html of an evaluation: one file that opens offline, made from evaluation.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

import newllm
from newllm.training.checkpoints import write_whole
from newllm.vintix.evaluate import EVALUATION_FILE
from newllm.vintix.report_frames import picture

HERE = Path(__file__).parent
STYLE = Path(newllm.__file__).parent / "experiments" / "report" / "style.css"  # the look of all reports

# Key: name, what it is, colour, dash.
CURVES = {
    "full": ("model", "its context goes on from episode to episode", "--ink", "solid"),
    "context_reset": ("context reset", "the same, its context emptied at every episode", "--model-0", "solid"),
    "reward_masked": ("reward masked", "the same, all rewards read as 0", "--model-1", "solid"),
    "demonstrator_only": ("demonstrator only", "trained on histories without learning", "--model-3", "solid"),
    "demonstrator": ("demonstrator", "knows the task", "--model-2", "dot"),
    "blind": ("blind demonstrator", "takes every task for the average one", "--model-4", "dash"),
    "random": ("random", "uniform in the action space", "--soft", "dot"),
}
TARGETS = {
    "taken": "the actions that were taken in the histories, noise and all",
    "demonstrator": "the actions the demonstrator would have taken in the histories, not those that were taken",
}
TARGET_SOURCES = {
    "taken": "Algorithm Distillation, arXiv 2210.14215",
    "demonstrator": "as in the Decision-Pretrained Transformer, arXiv 2306.14892",
}
SCALE = "(0 random play, 1 demonstrator)"
DASHES = ("solid", "dash", "dot")  # of runs that have one colour
REFERENCES = ("demonstrator", "blind", "random")  # drawn without their intervals, which the table has
STRIP_NOTES = {
    "point_reacher": "The path of the point, seen from above. The ring is the goal, which is not observed; the black "
    "dot is where the episode began, and a coloured one runs along the path.",
    "reacher": "The path of the fingertip, seen from above. The ring is the goal, which is not observed; the black "
    "dot is where the episode began, and a coloured one runs along the path.",
    "pendulum": "The pendulum at ten moments of the episode, from left to right. Upright is what is paid for.",
    "inverted_pendulum": "The pole at ten moments of the episode, from left to right.",
}


def write_report(folder: Path) -> Path:
    """Reads evaluation.json of a folder; writes report.html beside it and returns its path."""
    import jinja2

    results = json.loads((folder / EVALUATION_FILE).read_text(encoding="utf-8"))
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string((HERE / "report.html").read_text(encoding="utf-8"))
    path = folder / "report.html"
    write_whole(path, template.render(report_context(results)))
    return path


def report_context(results: dict[str, Any]) -> dict[str, Any]:
    """Everything the template shows."""
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    families = [family_context(family, results) for family in results["families"]]
    figures = {
        f"plot-{context['id']}": score_figure(family)
        for context, family in zip(families, results["families"], strict=True)
    }
    figures["plot-training"] = training_figure(results["runs"])
    data = {"figures": figures, "xName": {"score": "episode", "training": "step"}}
    names = [context["title"] for context in families]
    full = [run for run in results["runs"] if not run["demonstrator_only"]]
    return {
        "title": f"Learning in context: {', '.join(names)}",
        "short_facts": [
            f"{full[0]['parameters']:,} parameters",
            f"{len(full)} seed{'s' if len(full) > 1 else ''}",
            f"{sum(family['tasks'] for family in results['families'])} unseen tasks",
            "no weight update",
        ],
        "families": families,
        "episodes": results["settings"]["episodes"],
        "runs": results["runs"],
        "facts": facts(results),
        "command": results["command"],
        "config": as_yaml(results["config"]),
        # "<" could otherwise end the script element.
        "data": Markup(json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")),
        "style": Markup(STYLE.read_text(encoding="utf-8")),
        "script": Markup((HERE / "report.js").read_text(encoding="utf-8")),
        "plotly": Markup(get_plotlyjs()),
    }


def as_yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def family_context(family: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """One family's section."""
    settings = results["settings"]
    headline, last, kind = settings["headline_episode"], settings["episodes"], family["options"]["kind"]
    shown = sorted({1, headline, last})
    curves = {key: family["curves"][key] for key in CURVES if key in family["curves"]}
    rows = [
        {
            "name": CURVES[key][0],
            "about": CURVES[key][1],
            "cells": [
                {
                    "value": f"{values['value'][episode - 1]:.2f}",
                    "interval": f"[{values['low'][episode - 1]:.2f}, {values['high'][episode - 1]:.2f}]",
                }
                for episode in shown
            ],
            "seeds": ", ".join(map(str, values["seeds"])) or "—",
            "over": "tasks and seeds" if len(values["seeds"]) > 1 else "tasks",
        }
        for key, values in curves.items()
    ]
    return {
        "id": f"family-{family['name']}",
        "title": family["name"].replace("_", " "),
        "headline": f"{headline_words(family, headline)} {method_words(family, results['config'])}",
        "tasks": family["tasks"],
        "collect": as_yaml(family["collect"]),
        "table": {"episodes": shown, "rows": rows},
        "strips": strips(family),
        "strip_note": STRIP_NOTES.get(kind, ""),
        "wide": kind in ("pendulum", "inverted_pendulum"),
    }


def headline_words(family: dict[str, Any], episode: int) -> str:
    """What the curves say at one episode."""

    def score(key: str) -> str:
        values = family["curves"][key]
        value, low, high = (values[name][episode - 1] for name in ("value", "low", "high"))
        return f"{value:.2f} [{low:.2f}, {high:.2f}]"

    text = (
        f"{family['name'].replace('_', ' ').capitalize()}: in episode {episode} of an unseen task the model scores "
        f"{score('full')}, after {family['curves']['full']['value'][0]:.2f} in episode 1. With its context emptied at "
        f"every episode it scores {score('context_reset')}, with rewards masked {score('reward_masked')}"
    )
    if "demonstrator_only" in family["curves"]:
        text += f"; trained on histories of the demonstrator alone {score('demonstrator_only')}"
    return text + "."


def method_words(family: dict[str, Any], config: dict[str, Any]) -> str:
    """What the scores were made by, in a sentence: the target of training and the noise of the histories."""
    collect = family["collect"]
    noise = f"noise of power p = {collect['noise_power']:g} in their first {noisy_steps(collect)} steps"
    if noisy_steps(collect) == 0:
        noise = "no noise"
    return (
        f"The model was trained to give {TARGETS[config['target']]} (target {config['target']}); the histories, of "
        f"{collect['history_steps']} steps, have {noise}."
    )


def noisy_steps(collect: dict[str, Any]) -> int:
    """Steps of a history before its noise has ended."""
    return round((1 - collect["noise_free_share"]) * collect["history_steps"])


def noise_words(collect: dict[str, Any]) -> str:
    """The actions of the histories, as a formula."""
    noisy, power, share = noisy_steps(collect), f"{collect['noise_power']:g}", f"{collect['noise_free_share']:g}"
    if noisy == 0:
        return "all actions the demonstrator's, without noise (f = 1)"
    return (
        f"action (1 − ε(n))·demonstrator + ε(n)·uniform, with ε(n) = (1 − (n / {noisy})^{power})^(1/{power}) until "
        f"step n = {noisy} and 0 after it (p = {power}, f = {share})"
    )


def strips(family: dict[str, Any]) -> list[dict[str, Any]]:
    """Pictures of the recorded episodes, by task."""
    from markupsafe import Markup

    by_task: dict[int, list[dict[str, Any]]] = {}
    for strip in family["strips"]:
        svg = picture(family["options"], strip)
        if svg is not None:
            entry = {"svg": Markup(svg), "number": strip["episode"], "score": f"{strip['score']:.2f}"}
            by_task.setdefault(strip["task"], []).append(entry)
    return [{"task": task, "episodes": episodes} for task, episodes in by_task.items()]


def score_figure(family: dict[str, Any]) -> dict[str, Any]:
    """Normalised score against episode."""
    curves = []
    for key, (name, _, color, dash) in CURVES.items():
        if key not in family["curves"]:
            continue
        values = family["curves"][key]
        look: dict[str, Any] = {"name": name, "color": color, "dash": dash, "kind": "score"}
        look |= {"width": 3 if key == "full" else 2, "markers": key == "full"}
        episodes = list(range(1, len(values["value"]) + 1))
        band = {} if key in REFERENCES else {"low": values["low"], "high": values["high"]}
        curves.append(look | band | {"x": episodes, "y": values["value"]})
    return {"curves": curves, "xTitle": "episode", "yTitle": f"normalised score {SCALE}", "fromZero": False}


def training_figure(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Validation score against optimizer step, a line for each run, in the colour of what it plays above."""
    curves, drawn = [], {False: 0, True: 0}
    for run in runs:
        points = [point for point in run["curve"] if "score" in point]
        control = run["demonstrator_only"]
        color, dash = CURVES["demonstrator_only" if control else "full"][2], DASHES[drawn[control] % len(DASHES)]
        drawn[control] += 1
        curves.append(
            {"name": run["folder"], "color": color, "dash": dash, "width": 2, "markers": True, "kind": "training"}
            | {"x": [point["step"] for point in points], "y": [point["score"] for point in points]}
        )
    return {
        "curves": curves,
        "xTitle": "optimizer step",
        "yTitle": f"score on validation tasks {SCALE}",
        "fromZero": True,
    }


def facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    """How it was made, in words."""
    config, settings, machine = results["config"], results["settings"], results["machine"]
    families = results["families"]
    windows = config["batch_size"] * config["gradient_accumulation"]
    context = settings["evaluate_context"] or config["context"]
    return [
        ("Model", f"{config['num_layers']} blocks, {config['hidden_size']} wide, {config['num_heads']} heads"),
        (
            "Training",
            f"{config['steps']:,} optimizer steps of {windows} windows of {config['context']} steps; AdamW, peak "
            f"learning rate {config['lr']:g}",
        ),
        ("Target", f"{TARGETS[config['target']]} ({TARGET_SOURCES[config['target']]})"),
        *((f"Histories of {family['name'].replace('_', ' ')}", history_words(family)) for family in families),
        ("Context", f"the last {context} steps when it acts"),
        (
            "Precision",
            f"{config['precision']}{' autocast' if config['precision'] == 'bf16' else ''} in training; "
            f"{families[0]['precision']} in play, on validation and on test tasks",
        ),
        ("Intervals", interval_words(len(families[0]["curves"]["full"]["seeds"]), settings["resamples"])),
        ("Machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}, torch {machine['torch']}"),
    ]


def history_words(family: dict[str, Any]) -> str:
    """What was collected."""
    collect = family["collect"]
    each = collect["histories_per_task"]
    histories = f"{each} histories" if each > 1 else "one history"
    what = f"{collect['train_tasks']:,} tasks, {histories} of {collect['history_steps']} steps in each"
    return f"{what}; {noise_words(collect)}"


def interval_words(seeds: int, resamples: int) -> str:
    """What the intervals are over. A bootstrap of S seeds varies as (S − 1)/S of the seeds' own variance."""
    text = f"95 %, of {resamples:,} bootstrap samples of the test tasks"
    if seeds == 1:
        return f"{text}; how another seed would score, they do not say"
    return (
        f"{text}, and of the seeds where there are several (the table says where); so few seeds make their part too "
        f"narrow, with {seeds} by √({seeds - 1}/{seeds})"
    )
