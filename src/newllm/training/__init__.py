"""Training on the Hugging Face Trainer, exact to resume."""

from newllm.training.callbacks import TrainProgress
from newllm.training.devices import autocast, machine_info, resolve_device, resolve_precision, set_threads
from newllm.training.run import TrainResult, check_loggers, new_model, train
from newllm.training.suitability import check_suitability

__all__ = [
    "TrainProgress",
    "TrainResult",
    "autocast",
    "check_loggers",
    "check_suitability",
    "machine_info",
    "new_model",
    "resolve_device",
    "resolve_precision",
    "set_threads",
    "train",
]
