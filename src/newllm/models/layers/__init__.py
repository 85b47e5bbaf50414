"""Layer types. Importing this package registers every file in it; those used from Python are also named below."""

import importlib
import pkgutil

from newllm.models.layers.base import LAYER_TYPES, MLP, Layer, create_layer, layer_type, register_layer

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from newllm.models.layers.context import ContextLayer  # noqa: E402
from newllm.models.layers.hierarchical import HierarchicalLayer  # noqa: E402
from newllm.models.layers.infini import InfiniLayer  # noqa: E402
from newllm.models.layers.memory_adapter import MemoryAdapterLayer  # noqa: E402
from newllm.models.layers.mla import MLALayer  # noqa: E402
from newllm.models.layers.multi_memory import MultiMemoryLayer  # noqa: E402
from newllm.models.layers.pythia import PythiaLayer  # noqa: E402
from newllm.models.layers.v_dproj import VDProjLayer  # noqa: E402

__all__ = [
    "LAYER_TYPES",
    "MLP",
    "ContextLayer",
    "HierarchicalLayer",
    "InfiniLayer",
    "Layer",
    "MLALayer",
    "MemoryAdapterLayer",
    "MultiMemoryLayer",
    "PythiaLayer",
    "VDProjLayer",
    "create_layer",
    "layer_type",
    "register_layer",
]
