"""What is measured of a model: perplexity, speed and memory, and the checks of the layer contract."""

from newllm.evaluation.cache_size import CacheBytes, cache_bytes

__all__ = ["CacheBytes", "cache_bytes"]
