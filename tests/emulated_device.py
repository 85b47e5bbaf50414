"""A device that this machine has not, emulated: numbers are computed on the CPU, what CUDA would refuse is refused.

Run as a program, it takes every variant of every layer type and a model of every architecture through the checks and a
training step there, and prints what fails. A process of its own: the backend it registers cannot be taken
back, and the Trainer would then train on it.
"""

import torch
from torch import Tensor
from torch.utils import _pytree, backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from newllm.evaluation.checks import CHECK_SHAPE
from newllm.evaluation.contract import CHECKS, Subject
from newllm.evaluation.reading import as_measured
from newllm.models import create_model, load_preset, preset_names
from newllm.models.layers import LAYER_TYPES

aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default)
# Tensors of this device may be indexed by tensors of the CPU, not the other way round.
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
# The others take a single number of the CPU beside tensors of this device.
NO_NUMBERS = (aten.cat.default, aten.stack.default, aten.index_copy.default, aten.gather.default)
# Those that go every way through a model, with a cache and without. ('saved' and 'bytes' look into storages, of which
# an emulated tensor has none.)
CHECKED = ("after padding", "twin")


class Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend("emulated", backend_module=Backend())
DEVICE = torch.device("emulated", 0)


class There(Tensor):
    """A tensor on the emulated device; `here` has its numbers."""

    @staticmethod
    def __new__(cls, here):
        like = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        there = Tensor._make_wrapper_subclass(cls, here.shape, **like, device=DEVICE, requires_grad=here.requires_grad)
        there.here = here
        return there

    def tolist(self):
        return self.here.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


class Emulation(TorchDispatchMode):
    """Inside, DEVICE can be computed on."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def compute(operation, args, kwargs):
    given = [x for x in _pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = any(isinstance(x, There) for x in given)
    if there:
        refuse_mixture(operation, args, given)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs = kwargs | {"device": torch.device("cpu")}
    with _disable_current_modes():
        result = operation(*_pytree.tree_map(numbers, args), **_pytree.tree_map(numbers, kwargs))
    known = {id(numbers(x)): x for x in given}  # what was changed in place is returned itself

    def returned(x):
        if not isinstance(x, Tensor) or id(x) in known:
            return known.get(id(x), x)
        return There(x) if there else x

    return _pytree.tree_map(returned, result)


def numbers(x):
    return x.here if isinstance(x, There) else x


def refuse_mixture(operation, args, given):
    others = [x for x in given if not isinstance(x, There)]
    if operation in INDEXED:
        others = [] if isinstance(args[0], There) else [args[0]]
    elif operation in COPIES:
        others = []
    for x in others:
        if x.dim() or operation in NO_NUMBERS:
            raise RuntimeError(f"{operation}: a tensor {tuple(x.shape)} is on the CPU, another on {DEVICE}")


def subjects():
    """Small models by name and options: every variant of a layer, and a preset of every architecture."""
    for name, cls in LAYER_TYPES.items():
        for options in cls.variants:
            yield name, options
    presets = {load_preset(name).get("architecture"): name for name in preset_names()}
    for name in presets.values():
        yield name, {}


def problems(name, options):
    """What a model does on the device that CUDA would refuse, or that gives other numbers."""
    torch.manual_seed(0)
    model = create_model(name, **CHECK_SHAPE, **options).double().to(DEVICE)
    ids = torch.randint(model.config.vocab_size, (3, 6)).to(DEVICE)
    found = {}
    with as_measured(model, "float32"):
        for check in CHECKED:
            try:
                passed, detail = CHECKS[check][0](Subject(model, ids, 1e-10))
            except Exception as error:
                passed, detail = False, f"{type(error).__name__}: {error}"
            if passed is False:
                found[check] = detail
    try:
        model.train()(input_ids=ids, labels=ids).loss.backward()
    except Exception as error:
        found["training"] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    _tensor = torch.tensor

    def tensor(data, *, device="cpu", **options):  # the original writes to its device past the emulation
        return _tensor(data, **options).to(device)

    torch.tensor = tensor
    with Emulation():
        for name, options in subjects():
            for check, detail in problems(name, options).items():
                print(f"{name} {options}: {check}: {detail}")
