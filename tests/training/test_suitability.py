"""What cannot be trained is told before anything trains."""

import pytest

from newllm.settings import RunSettings, UserError, resolve
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
