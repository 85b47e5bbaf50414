"""Which models can be trained in which way: told before anything trains."""

from __future__ import annotations

from newllm.data.tasks import task_shares
from newllm.errors import UserError, flag
from newllm.models import TransformerLM, meta_model
from newllm.models.adaptation import check_residuals
from newllm.models.cache import TokenState
from newllm.models.interop import trained_residuals
from newllm.models.layers import Layer
from newllm.models.memory import layers_with_memories
from newllm.models.projection import DProjLM
from newllm.models.recurrent import RecurrentLM
from newllm.settings import CommonSettings
from newllm.training.ranks import world_size
from newllm.training.start import check_start


def check_suitability(settings: CommonSettings, models: list[str]) -> None:
    """Raises UserError where a model would not learn what it is there for.

    - With --streaming, rows read on without end: a layer may not keep every token, and each row stays with its process,
      of which there can be only one. And tasks make windows that stand alone, which is something else.
    - Tasks must leave steps for the text.
    - Without, every window begins with empty memories: it must be longer than a segment, or none is ever read.
    - Lagged Cache Training keeps the states of windows, in the one process that trains on them; its deeper steps must
      be deeper than the others; and what makes a state that later tokens alone read learns nothing from a single pass.
    - A trained model to start from must be there, of their size, and with MLPs that read the same.
    """
    check_start(settings)
    shares = {flag(name): share for name, share in task_shares(settings).items()}
    if settings.streaming and shares:
        raise UserError(
            f"--streaming reads documents from beginning to end, {next(iter(shares))} makes windows that stand alone: "
            "choose one of them"
        )
    if sum(shares.values()) >= 1:
        raise UserError(f"{' and '.join(shares)} are {sum(shares.values()):g} together: they must be less than 1")
    if settings.streaming and world_size() > 1:
        raise UserError(
            "--streaming works in one process: its rows would not stay where their states are; leave it out"
        )
    for name in models:
        model = meta_model(name, **settings.shape())
        if model.state_size and not settings.step_by_step:
            _check_lagged(name, model, settings)
        if isinstance(model, DProjLM) and world_size() > 1:
            raise UserError(f"{name}: its projection is trained first, in one process: leave torchrun out")
        if settings.start_from is not None:
            try:
                check_residuals(trained_residuals(settings.start_from), model)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
        if settings.streaming:
            _check_states(name, model)
        else:
            _check_segments(name, model, settings)


def _check_lagged(name: str, model: TransformerLM, settings: CommonSettings) -> None:
    if settings.streaming:
        raise UserError(
            f"--streaming: {name} feeds a state back and is trained by Lagged Cache Training, which keeps the states "
            "of windows, not of rows that read on: leave it out, or train by true recurrence with --step-by-step true"
        )
    if world_size() > 1:
        raise UserError(
            f"{name} feeds a state back: Lagged Cache Training works in one process, since each would keep states "
            "that another one needs; train by true recurrence with --step-by-step true"
        )
    if settings.lagged_grad_passes > settings.lagged_passes:
        raise UserError(
            f"--lagged-grad-passes is {settings.lagged_grad_passes}: it must be no more than "
            f"--lagged-passes {settings.lagged_passes}"
        )
    # As many passes as the others take, but all of them with gradient, are deeper too.
    least = settings.lagged_passes + (settings.lagged_grad_passes == settings.lagged_passes)
    if settings.lagged_deep_share and settings.lagged_deep_passes < least:
        raise UserError(
            f"--lagged-deep-passes is {settings.lagged_deep_passes}: with --lagged-deep-share "
            f"{settings.lagged_deep_share:g} and --lagged-passes {settings.lagged_passes} it must be at least {least}, "
            "or the deeper steps are none"
        )
    if isinstance(model, RecurrentLM) and model.state_learns_from_later_tokens and settings.lagged_grad_passes < 2:
        raise UserError(
            f"{name}: its state is read by later tokens alone, so one pass with gradient would never teach it "
            "what to keep: train by true recurrence with --step-by-step true, or with at least --lagged-passes 2 "
            "--lagged-grad-passes 2"
        )


def _check_states(name: str, model: TransformerLM) -> None:
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        if any(isinstance(part, TokenState) and part.window is None for part in layer.make_state().parts()):
            remedy = (
                f"give it a window, as in {name}{_next_option(name)}window=128"
                if "window" in layer.option_names()
                else f"a layer of type '{layer.type_name}' has no window; train this model without --streaming"
            )
            raise UserError(
                f"--streaming: layer {number} of {name} (type '{layer.type_name}') keeps every token it reads, "
                f"and rows read on without end: {remedy}"
            )


def _check_segments(name: str, model: TransformerLM, settings: CommonSettings) -> None:
    length = settings.seq_length
    assert length is not None
    for number, layer in layers_with_memories(model.layers).items():
        if layer.segment_length >= length:
            raise UserError(
                f"layer {number} of {name} writes its memory after every {layer.segment_length} tokens, and no window "
                f"of --seq-length {length} reads on from there: nothing would be learnt of it; take shorter segments, "
                f"as in {name}{_next_option(name)}segment_length={max(1, length // 4)}, or longer windows"
            )


def _next_option(name: str) -> str:
    return "," if ":" in name else ":"
