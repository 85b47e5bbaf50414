"""When a run logs and evaluates, and in which order it sees its windows."""

import math

from hypothesis import given
from hypothesis import strategies as st

from newllm.resolution import resolve
from newllm.settings import RunSettings
from newllm.training.callbacks import LONGEST_LOG_WINDOW, Schedule, evaluations_without_progress, out_of_patience
from newllm.training.run import total_steps
from newllm.training.trainer import RunSampler


def settings(**changes):
    return resolve(RunSettings(**changes))


def evaluation_steps(schedule):
    return [step for step in range(schedule.total_steps + 2) if schedule.evaluates_after(step)]


@given(steps=st.integers(1, 5000), evaluations=st.integers(1, 60))
def test_evaluates_at_equal_distances_and_at_the_end(steps, evaluations):
    schedule = Schedule.of(steps, settings(max_tokens=10, evaluations=evaluations))
    places = evaluation_steps(schedule)
    assert places[-1] == steps
    assert len(places) == min(steps, evaluations)
    gaps = [b - a for a, b in zip([0, *places], places, strict=False)]
    assert max(gaps) - min(gaps) <= 1 or steps < evaluations
    assert 1 <= schedule.log_every <= LONGEST_LOG_WINDOW


def test_more_evaluations_than_steps_are_one_after_each():
    assert evaluation_steps(Schedule.evenly(3, 10**18)) == [1, 2, 3]


@given(steps=st.integers(1, 5000), evaluations=st.integers(1, 5000))
def test_the_places_are_rounded_multiples(steps, evaluations):
    schedule = Schedule.evenly(steps, evaluations)
    count = min(steps, evaluations)
    assert evaluation_steps(schedule) == [round(n * steps / count) for n in range(1, count + 1)]


def test_a_run_that_only_patience_ends_is_planned_at_once():
    """A billion evaluations, one an epoch."""
    schedule = Schedule.of(10**12, settings(epochs=1e9, patience=1))
    assert [schedule.evaluates_after(step) for step in (999, 1000, 1001, 10**12)] == [False, True, False, True]


@given(epochs=st.floats(1, 12), steps_per_epoch=st.integers(3, 200))
def test_evaluates_at_least_once_an_epoch(epochs, steps_per_epoch):
    steps = math.ceil(epochs * steps_per_epoch)
    places = evaluation_steps(Schedule.of(steps, settings(epochs=epochs, evaluations=1)))
    assert max(b - a for a, b in zip([0, *places], places, strict=False)) <= steps_per_epoch + 1


@given(windows=st.integers(1, 40), samples=st.integers(1, 150), seed=st.integers(0, 5))
def test_every_pass_sees_every_window_once(windows, samples, seed):
    order = list(RunSampler(windows, samples, seed))
    assert len(order) == len(RunSampler(windows, samples, seed)) == samples
    for start in range(0, samples, windows):
        one_pass = order[start : start + windows]
        assert len(set(one_pass)) == len(one_pass)
        assert set(one_pass) <= set(range(windows))
    assert order == list(RunSampler(windows, samples, seed))


def test_the_seed_and_the_pass_change_the_order():
    assert list(RunSampler(50, 50, 0)) != list(RunSampler(50, 50, 1))
    two_passes = list(RunSampler(50, 100, 0))
    assert two_passes[:50] != two_passes[50:]


@given(max_tokens=st.integers(1, 10**6), batch=st.integers(1, 32), length=st.integers(2, 512))
def test_the_budget_in_tokens_is_never_exceeded_by_more_than_the_first_step(max_tokens, batch, length):
    steps = total_steps(settings(max_tokens=max_tokens, seq_length=length), 100, batch)
    assert steps * batch * length <= max(max_tokens, batch * length)
    assert (steps + 1) * batch * length > max_tokens


def test_the_budget_in_epochs_covers_every_sample():
    assert total_steps(settings(epochs=2), num_windows=100, samples_per_step=8) == 25
    assert total_steps(settings(epochs=0.5), num_windows=100, samples_per_step=8) == 7


def test_patience_counts_evaluations_since_the_best():
    history = [{"eval_loss": loss} for loss in (3.0, 2.0, 2.5)] + [{"loss": 1.0}]
    assert evaluations_without_progress(history) == 1
    assert evaluations_without_progress([*history, {"eval_loss": 2.0}]) == 2
    assert out_of_patience(history, settings(patience=1))
    assert not out_of_patience(history, settings(patience=2))
    assert not out_of_patience(history, settings(patience=0))
    assert not out_of_patience([], settings(patience=1))
