"""What a step costs with a ring of keys and values, and when the context is read again at every step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from newllm.devices import machine_info, prepare_process, resolve_device
from newllm.vintix.inference import VintixEngine
from newllm.vintix.model import VintixConfig, VintixModel, group_spec
from newllm.vintix.settings import VintixBench, model_values


def bench_vintix(settings: VintixBench, progress: Callable[[str], None]) -> dict[str, Any]:
    """Milliseconds of a step in all environments at once, by both ways, after some laps of the ring.

    A speed is that of the shape alone: weights and observations are random. Neither way is helped: the recomputation
    computes the action of the last step only.

    Returns:
        {"benchmark", "machine", "settings", "cache_bytes", "rows": [{"steps_read", "ring_ms", "recomputed_ms",
        "speed_ratio": {"ratio", "range"}}]}; times are medians over the rounds, the ratio's range is over them too.
    """
    settings.check()
    prepare_process(settings.threads)
    device = resolve_device(settings.device)
    torch.manual_seed(0)
    model = _model(settings).to(device)  # type: ignore[arg-type]
    engine = VintixEngine(model, settings.environments)
    shape = settings.environments, settings.observation_size
    observation, reward = np.random.default_rng(0).normal(size=shape), np.zeros(settings.environments)
    window = _window(settings, device)

    def ring() -> None:
        engine.act(observation, reward)

    def recomputation() -> None:
        with torch.no_grad():
            model(**window, last_only=True)

    rows: list[dict[str, Any]] = [{"steps_read": lap * settings.context, "rounds": []} for lap in settings.laps]
    for number in range(settings.rounds):
        for lap, row in zip(settings.laps, rows, strict=True):
            progress(f"round {number + 1} of {settings.rounds}: after {row['steps_read']:,} steps")
            _fill(engine, lap * settings.context)
            ring()
            row["rounds"].append((_milliseconds(ring, settings.steps, device), _milliseconds(recomputation, 1, device)))
    for row in rows:
        times = row.pop("rounds")
        ratios = [recomputed / cached for cached, recomputed in times]
        row["ring_ms"], row["recomputed_ms"] = (statistics.median(column) for column in zip(*times, strict=True))
        row["speed_ratio"] = {"ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
    result = {"benchmark": "vintix", "machine": machine_info(), "settings": asdict(settings)}
    return result | {"cache_bytes": engine.ring.nbytes(), "rows": rows}


def _model(settings: VintixBench) -> VintixModel:
    o, a = settings.observation_size, settings.action_size
    group = group_spec("bench", [0.0] * o, [1.0] * o, [-1.0] * a, [1.0] * a)
    return VintixModel(VintixConfig(groups=[group], **model_values(settings))).eval()


def _window(settings: VintixBench, device: torch.device) -> dict[str, torch.Tensor]:
    """A context full of steps, all of one episode."""
    B, T = settings.environments, settings.context
    steps = torch.arange(T, device=device).expand(B, T)
    return {
        "observation": torch.randn(B, T, settings.observation_size, device=device),
        "previous_action": torch.randn(B, T, settings.action_size, device=device),
        "previous_reward": torch.randn(B, T, 1, device=device),
        "episode_start": steps == 0,
        "history_start": steps == 0,
        "step_in_episode": steps,
    }


def _fill(engine: VintixEngine, steps: int) -> None:
    """As if the engine had read so many steps."""
    engine.ring.keys.normal_()
    engine.ring.values.normal_()
    engine.ring.step = steps - 1
    engine.fresh[:] = False


def _milliseconds(work: Callable[[], None], times: int, device: torch.device) -> float:
    """Of one call, mean over several."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    _synchronize(device)
    return 1000 * (time.perf_counter() - start) / times


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
