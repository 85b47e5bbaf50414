"""The contract every model keeps, checked on a live model and told in words: what is broken, and at which position.

Used by `newllm check`, by every compare run, and by the contract tests. SYSTEMS §16.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from newllm.errors import first_line
from newllm.evaluation.contract import CHECKS, Subject
from newllm.evaluation.reading import as_measured
from newllm.models.factory import create_model
from newllm.models.transformer import TransformerLM
from newllm.settings import Precision

# Largest difference allowed between two ways of computing the same logits, relative to the largest logit.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# The same for models whose caches are quantised: a number that lies between two codes is rounded either way.
QUANTISED_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-2, torch.bfloat16: 1e-1, torch.float16: 2e-2}
# Shape of the models built to check a layer type: small, and every size different, so that a mixed-up dimension shows.
CHECK_SHAPE = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 80, "vocab_size": 61}

DECISIVE = ("finite", "future", "rows")
"""Those without which no figure of a model means anything."""


@dataclass(frozen=True)
class CheckResult:
    """One line of the diagnosis. `passed` is None where an earlier failure makes the question meaningless."""

    name: str
    passed: bool | None
    detail: str


def check_model(model: TransformerLM, tokens: int = 160) -> list[CheckResult]:
    """Runs the whole contract on a model, trained or not, with `tokens` random ids a row (meaning plays no part here).

    Returns one CheckResult per point, in the order of CHECKS.
    """
    tolerance = TOLERANCE if model.config.cache_precision == "model" else QUANTISED_TOLERANCE
    return _run(Subject(model, _ids(model, tokens), tolerance[model.dtype]), CHECKS, "float32")


def check_as_trained(model: TransformerLM, tokens: int, precision: Precision) -> list[CheckResult]:
    """'finite', 'future' and 'rows' once more, as the model was trained and its perplexity is measured.

    Args:
        tokens: as long as the longest window a perplexity is taken in, so that no boundary within it is missed.
        precision: that of training.
    """
    subject = Subject(model, _ids(model, tokens), TOLERANCE[torch.bfloat16])
    results = _run(subject, DECISIVE, precision)
    return [CheckResult(f"{result.name}, as trained", result.passed, result.detail) for result in results]


def _ids(model: TransformerLM, tokens: int) -> Tensor:
    """(3, tokens) random ids, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (3, tokens), generator=generator).to(model.device)


def _run(subject: Subject, names: Iterable[str], precision: Precision) -> list[CheckResult]:
    results: dict[str, CheckResult] = {}
    with as_measured(subject.model, precision), subject.model.without_memory():
        for name in names:
            check, needs = CHECKS[name]
            broken = [need for need in needs if results[need].passed is not True]
            if broken:
                detail = f"not judged: '{broken[0]}' fails, and this would follow from it"
                results[name] = CheckResult(name, None, detail)
                continue
            passed: bool | None
            try:
                passed, detail = check(subject)
            except Exception as error:  # a user's layer may raise anything: that is a finding too
                passed, detail = False, f"raised {type(error).__name__}: {first_line(error)}"
            results[name] = CheckResult(name, passed, detail)
    return list(results.values())


def check_layer_types(names: list[str], **options) -> dict[str, list[CheckResult]]:
    """The contract on small float64 models of the named presets or layer types, freshly initialised."""
    results = {}
    for name in names:
        torch.manual_seed(0)
        model = create_model(name, **{**CHECK_SHAPE, **options}).double()
        # Larger weights than at the start of training: a leak must not hide behind nearly uniform attention. (Without
        # layers there is none, and no normalisation either: a recurrence would leave the range of numbers.)
        if len(model.layers):
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.data.mul_(5)
        # Nor behind a gate that starts closed.
        for layer in model.layers:
            for gate in layer.gate_parameters():  # type: ignore[operator]
                gate.data.add_(0.5)
        results[name] = check_model(model, tokens=24)
    return results


def failed(results: list[CheckResult]) -> list[CheckResult]:
    return [result for result in results if result.passed is False]


def is_causal(results: list[CheckResult]) -> bool:
    """Whether the run's figures mean anything: no future leak, no mixing of rows, all numbers finite."""
    return all(result.passed is not False for result in results if result.name.split(",")[0] in DECISIVE)
