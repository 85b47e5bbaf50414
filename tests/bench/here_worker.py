"""A worker of the benchmarks without a process of its own: starting one takes seconds."""

import json

from newllm.bench.worker import BenchWork


class HereWorker:
    def __init__(self, name: str, environment: dict[str, str] | None = None) -> None:
        self.name, self.environment, self.work = name, environment, BenchWork()

    def call(self, command: str, **arguments) -> dict:
        return json.loads(json.dumps(getattr(self.work, command)(**arguments)))

    def close(self) -> None:
        """Nothing to end."""
