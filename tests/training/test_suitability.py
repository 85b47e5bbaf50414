"""What cannot be trained is told before anything trains."""

import pytest

from newllm.errors import UserError
from newllm.resolution import resolve
from newllm.settings import RunSettings
from newllm.training import check_suitability


def check(*models, **settings):
    check_suitability(resolve(RunSettings(**settings)), list(models))


def test_windows_must_be_longer_than_the_segments_of_memories():
    check("pythia", "infini:segment_length=32", "segment_local", seq_length=128)
    with pytest.raises(UserError, match=r"layer 0 of infini writes .* infini:segment_length=32, or longer windows"):
        check("pythia", "infini", seq_length=128)
    with pytest.raises(UserError, match="multi_memory:num_memories=2,segment_length=16"):
        check("multi_memory:num_memories=2", seq_length=64)
    check("infini_all", seq_length=128, streaming=True)


def test_streams_stay_in_one_process(monkeypatch):
    check("infini_all", streaming=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        check("infini_all", streaming=True)


def test_streams_and_recall_windows_exclude_each_other():
    with pytest.raises(UserError, match="choose one of them"):
        check("infini_all", streaming=True, recall_share=0.5)


@pytest.mark.parametrize(
    ("passes", "grad_passes", "deep_passes", "least"),
    [(1, 1, 4, None), (1, 1, 1, 2), (8, 1, 4, 8), (8, 1, 8, None), (8, 8, 8, 9), (8, 8, 9, None), (4, 2, 3, 4)],
)
def test_deeper_steps_must_be_deeper(passes, grad_passes, deep_passes, least):
    lagged = {"lagged_passes": passes, "lagged_grad_passes": grad_passes, "lagged_deep_passes": deep_passes}
    check("continuous_fuse", **lagged)
    check("pythia", **lagged, lagged_deep_share=0.1)
    check("continuous_fuse", **lagged, lagged_deep_share=0.1, step_by_step=True)
    if least is None:
        check("continuous_fuse", **lagged, lagged_deep_share=0.1)
    else:
        words = rf"--lagged-deep-passes is {deep_passes}: .*--lagged-passes {passes} it must be at least {least}, "
        with pytest.raises(UserError, match=words):
            check("continuous_fuse", **lagged, lagged_deep_share=0.1)


def test_a_share_of_deeper_steps_alone_is_enough():
    check("continuous_fuse", lagged_deep_share=0.1)
    with pytest.raises(UserError, match=r"^--lagged-deep-passes is 4: with --lagged-deep-share 0.1 [^\n]*$"):
        check("continuous_fuse", lagged_passes=8, lagged_deep_share=0.1)


def test_a_state_that_only_later_tokens_read_is_not_trained_by_a_single_pass():
    words = r"^context_vector:depth=2: its state is read by later tokens alone.* --step-by-step true, or .*-passes 2$"
    for passes in (1, 3):
        with pytest.raises(UserError, match=words):
            check("pythia", "context_vector:depth=2", lagged_passes=passes)
    check("pythia", "context_vector", step_by_step=True)
    check("pythia", "context_vector", lagged_passes=2, lagged_grad_passes=2)
    check("context_pythia", "continuous", "dproj", "context_plain")
