"""Device and precision: what is asked for, what there is."""

import platform
import resource

import pytest
import torch

from newllm.devices import autocast, machine_info, prepare_process, resolve_device, resolve_precision
from newllm.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("device", ["gpu", "cuda:0", "mps", ""])
def test_an_unknown_device_is_refused(device):
    with pytest.raises(UserError, match="auto, cpu or cuda"):
        resolve_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(UserError, match="no CUDA GPU"):
        resolve_device("cuda")


def test_auto_precision_follows_the_hardware(monkeypatch):
    assert resolve_precision("bf16", CPU) == "bf16"
    for has, expected in ((True, "bf16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {"avx512_bf16": has})
        assert resolve_precision("auto", CPU) == expected


def test_autocast_computes_in_the_named_precision():
    x = torch.ones(4, 4)
    with autocast(CPU, "bf16"):
        assert (x @ x).dtype == torch.bfloat16
    with autocast(CPU, "float32"):
        assert (x @ x).dtype == torch.float32


def test_machine_info_names_what_figures_depend_on():
    info = machine_info()
    assert info["cores"] >= 1
    assert info["memory_bytes"] > 2**28
    assert info["torch"] == torch.__version__


def test_more_threads_than_any_machine_has_are_refused():
    before = torch.get_num_threads()
    with pytest.raises(UserError, match="--threads is 100000: it must be at most 1024"):
        prepare_process(100_000)
    assert torch.get_num_threads() == before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_for_the_next_tensor():
    """Another 16 MiB are written into the pages of those before, and not into new ones each time."""
    prepare_process(None)
    pages = 2**24 // resource.getpagesize()
    for _ in range(32):  # until blocks that were freed next to each other have become large enough
        torch.ones(2**22)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(32):
        torch.ones(2**22)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 8 * pages
