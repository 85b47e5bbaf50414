"""Wrong input of many kinds: exit code 2 and exactly one line on stderr that says what, and what would be valid."""

import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import zstandard

from newllm import cli

SHAPE = {"hidden-size": 16, "num-layers": 1, "num-heads": 2, "intermediate-size": 16}
TEXT = {"vocab-size": 270, "seq-length": 16}
SHORT = {"max-tokens": 2000, "batch-size": 4, "evaluations": 1, "sliding-window": 16, "sliding-stride": 8}
SENTENCES = [f"Document {n}: the cat sat on mat {n * n} and looked at the dog. " * 8 for n in range(40)]


def as_flags(**values) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


@dataclass
class Place:
    """A folder to put wrong files into."""

    folder: Path

    def file(self, name: str, content: str | bytes) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def empty_folder(self, name: str) -> str:
        (self.folder / name).mkdir()
        return str(self.folder / name)

    def texts(self) -> str:
        return self.file("texts.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))

    def config(self, content: str | bytes) -> list[str]:
        return ["compare", "--config", self.file("my.yaml", content)]

    def pipe(self, name: str) -> str:
        os.mkfifo(self.folder / name)
        return str(self.folder / name)

    def data(self, name: str, content: str | bytes) -> list[str]:
        return ["data", "prepare", "--data", self.file(name, content)]

    def train(self, *flags: str) -> list[str]:
        return [
            "train",
            "--data",
            self.texts(),
            *as_flags(**SHAPE, **TEXT, **SHORT),
            "--out",
            str(self.folder / "run"),
            *flags,
        ]

    def compare(self, *flags: str) -> list[str]:
        return ["compare", "--data", self.texts(), *as_flags(**SHAPE, **TEXT, **SHORT), "--models", "mqa", *flags]

    def plugin(self, code: str) -> list[str]:
        imports = "from newllm.models import register_preset; from newllm.models.layers import Layer, register_layer\n"
        return ["check", "--plugin", self.file("a.py", imports + code)]

    def model(self, config: dict, weights: bytes) -> str:
        self.file("model/config.json", json.dumps(config))
        self.file("model/model.safetensors", weights)
        return str(self.folder / "model")

    def run(self) -> str:
        assert cli.main(self.train()) == 0
        return str(self.folder / "run")

    def run_of(self, config: str) -> str:
        return str(Path(self.file("run/config.yaml", config)).parent)

    def truncated_model(self) -> str:
        run = self.run()
        weights = Path(run) / "model" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        return run

    def zst(self) -> bytes:
        lines = "".join(json.dumps({"text": os.urandom(50).hex()}) + "\n" for _ in range(500))
        return zstandard.compress(lines.encode())[:-200]


SIZES = ("hidden_size", "num_heads", "intermediate_size")
NEOX = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}
COMPARE = ["compare", "--out", "never"]

# name: (command line, or a function of a Place that prepares files and gives it; what the line must contain)
CASES = {
    # commands and flags
    "unknown command": (["comapre"], "did you mean 'compare'?"),
    "unknown option before a command": (["--verison"], "did you mean '--version'?"),
    "unknown command of a group": (["data", "shwo"], "did you mean 'show'?"),
    "misspelt flag": ([*COMPARE, "--max-tokns", "5"], "unknown option '--max-tokns': did you mean '--max-tokens'?"),
    "flag with underscore": ([*COMPARE, "--max_tokens=5"], "did you mean '--max-tokens'?"),
    "abbreviated flag": ([*COMPARE, "--hidden", "64"], "unknown option '--hidden'"),
    "stray argument": (["report", "folder", "another"], "unexpected argument 'another'"),
    "flag without its value": (["compare", "--out"], "--out: expected one argument"),
    "missing argument": (["generate"], "required: model"),
    "text for a whole number": (
        [*COMPARE, "--max-tokens", "many"],
        "--max-tokens is 'many': it must be a whole number",
    ),
    "fraction for a whole number": (
        [*COMPARE, "--batch-size", "2.5"],
        "--batch-size is '2.5': it must be a whole number",
    ),
    "nothing for a whole number": ([*COMPARE, "--max-tokens", ""], "--max-tokens is '': it must be a whole number"),
    "text for a number": ([*COMPARE, "--lr", "high"], "--lr is 'high': it must be a number"),
    "neither true nor false": ([*COMPARE, "--efficiency", "perhaps"], "it must be true or false"),
    "no such choice": ([*COMPARE, "--precision", "bf17"], "unknown --precision 'bf17': did you mean 'bf16'?"),
    "no such choice in a list": ([*COMPARE, "--report-to", "wandbb"], "did you mean 'wandb'?"),
    "text in a list of numbers": ([*COMPARE, "--seeds", "0", "one"], "--seeds is 'one': it must be a whole number"),
    # values
    "negative budget": ([*COMPARE, "--max-tokens", "-5"], "--max-tokens is -5: it must be greater than 0"),
    "epochs without end": ([*COMPARE, "--epochs", "1e20"], "--epochs is 1e+20: it must be at most 1,000,000,000"),
    "zero batch": ([*COMPARE, "--batch-size", "0"], "--batch-size is 0: it must be greater than 0"),
    "window of one token": ([*COMPARE, "--seq-length", "1"], "--seq-length is 1: it must be at least 2"),
    "position window of one token": ([*COMPARE, "--position-window", "1"], "--position-window is 1: it must be at"),
    "sliding window of one token": ([*COMPARE, "--sliding-window", "1"], "--sliding-window is 1: it must be at least"),
    "context too short": ([*COMPARE, "--decode-context", "3"], "--decode-context is 3: it must be at least 4"),
    "negative patience": ([*COMPARE, "--patience", "-1"], "--patience is -1: it must be at least 0"),
    "beta of 1": ([*COMPARE, "--adam-beta1", "1"], "--adam-beta1 is 1.0: it must lie in [0, 1)"),
    "negative beta": ([*COMPARE, "--adam-beta2", "-0.1"], "--adam-beta2 is -0.1: it must lie in [0, 1)"),
    "learning rate not a number": (lambda p: p.config("lr: .nan"), "my.yaml: lr is nan: it must be a finite number"),
    "learning rate infinite": ([*COMPARE, "--lr", ".inf"], "--lr is inf: it must be a finite number"),
    "negative weight decay": ([*COMPARE, "--weight-decay", "-1"], "--weight-decay is -1.0: it must be at least 0"),
    "negative clipping": ([*COMPARE, "--max-grad-norm", "-1"], "--max-grad-norm is -1.0: it must be at least 0"),
    "negative minutes": ([*COMPARE, "--checkpoint-minutes", "-1"], "--checkpoint-minutes is -1.0: it must be at"),
    "negative memory": ([*COMPARE, "--lagged-memory", "-1"], "--lagged-memory is -1.0: it must be at least 0"),
    "no seconds": ([*COMPARE, "--efficiency-seconds", "0"], "--efficiency-seconds is 0.0: it must be greater than 0"),
    "negative seed": (lambda p: p.train("--seed", "-1"), "--seed is -1: a seed is a whole number from 0 to 4294967295"),
    "seed beyond 32 bits": ([*COMPARE, "--seeds", "0", "4294967296"], "--seeds is [0, 4294967296]: a seed is"),
    "number beyond 64 bits": ([*COMPARE, "--max-documents", "9" * 20], f"--max-documents is {'9' * 20}: it must lie"),
    "task count beyond 64 bits": (["vintix", "collect", "--train-tasks", "9" * 20], "it must lie within 64 bits"),
    "text that is no UTF-8": ([*COMPARE, "--name", "caf\udce9"], "--name is 'caf\\udce9': it must be UTF-8 text"),
    "nobody to distil from": ([*COMPARE, "--distil-tokens", "9"], "--distil-tokens 9 teaches layers what those of a"),
    "share beyond 1": ([*COMPARE, "--warmup-ratio", "1.5"], "--warmup-ratio is 1.5: it must lie in [0, 1)"),
    "hidden size not divisible": ([*COMPARE, "--hidden-size", "250"], "--hidden-size 250 does not divide"),
    "unknown scale": ([*COMPARE, "--scale", "smal"], "unknown scale 'smal': did you mean 'small'?"),
    "no models": (["compare", "--models"], "--models is empty"),
    "a model twice": ([*COMPARE, "--models", "gqa", "gqa"], "--models names a model twice"),
    "a seed twice": ([*COMPARE, "--seeds", "1", "1"], "each only once"),
    "unknown device": (lambda p: p.train("--device", "tpu"), "must be auto, cpu or cuda"),
    "no such device": (lambda p: p.train("--device", "cuda"), "torch finds no CUDA GPU"),
    "logger that is not installed": (lambda p: p.train("--report-to", "trackio"), "this package is not installed"),
    "logger of a comparison": (lambda p: p.compare("--report-to", "trackio"), "(pip install trackio)"),
    # models
    "unknown preset": (lambda p: p.train("--model", "pythai"), "unknown model 'pythai': did you mean 'pythia'?"),
    "unknown layer option": (lambda p: p.train("--model", "gqa:num_kv_heds=1"), "did you mean 'num_kv_heads'?"),
    "layer option without value": (lambda p: p.train("--model", "gqa:window"), "write options as name=value"),
    "key/value heads that do not divide": (lambda p: p.train("--model", "gqa:num_kv_heads=3"), "num_kv_heads 3"),
    "shape as an option": (lambda p: p.train("--model", "gqa:hidden_size=64"), "hidden_size is no option of a model"),
    "no key/value heads": (lambda p: p.train("--model", "pythia:num_kv_heads=0"), "num_kv_heads is 0: it must be a"),
    "key/value heads below 0": (lambda p: p.train("--model", "gqa:num_kv_heads=-2"), "num_kv_heads is -2: it must be"),
    "fractional window": (lambda p: p.train("--model", "gqa:window=2.5"), "window is 2.5: it must be a whole number"),
    "window of no tokens": (lambda p: p.train("--model", "gqa:window=0"), "window is 0: it must be a whole number"),
    "rotary heads of one number": (
        lambda p: p.train("--num-heads", "16"),
        "position 'rope' turns pairs of numbers, and a head has 1",
    ),
    "rotary heads of one number in segments": (
        lambda p: p.train("--num-heads", "16", "--model", "infini_all:position=rope"),
        "and a head has 1: choose fewer heads, or position=alibi",
    ),
    "text for a number of the model": (
        lambda p: p.train("--model", "pythia:initializer_range=abc"),
        "initializer_range is 'abc': it must be a number",
    ),
    "negative range": (
        lambda p: p.train("--model", "pythia:initializer_range=-1"),
        "initializer_range is -1: it must be at least 0",
    ),
    "text for the size of embeddings": (
        lambda p: p.train("--model", "pythia:embedding_std=big"),
        "embedding_std is 'big': it must be a number",
    ),
    "embeddings of negative size": (
        lambda p: p.train("--model", "pythia:embedding_std=-0.2"),
        "embedding_std is -0.2: it must be at least 0",
    ),
    "300 digits in an option": (lambda p: p.train("--model", f"gqa:window={'1' * 300}"), "the value of window cannot"),
    "1,000 brackets in an option": (lambda p: p.train("--model", f"gqa:window={'[' * 1000}"), "the value of window"),
    "position given twice": (
        lambda p: p.train("--model", "gqa:position=none,position.type=alibi"),
        "for example gqa:position.type=alibi",
    ),
    "option not YAML": (lambda p: p.train("--model", "gqa:window=["), "write it as in gqa:window=128"),
    "unknown position encoding": (lambda p: p.train("--model", "pythia:position=ropee"), "'ropee'"),
    # config files
    "no config of that name": (["compare", "--config", "nosuchconfig"], "unknown config 'nosuchconfig'"),
    "no config file": (["compare", "--config", "folder/none.yaml"], "folder/none.yaml: no such file"),
    "config is a folder": (lambda p: ["compare", "--config", p.empty_folder("my") + "/"], "a folder: give a YAML file"),
    "config with a very long name": (["compare", "--config", f"{'a' * 300}.yaml"], "aaa.yaml: file name too long"),
    "misspelt key": (
        lambda p: p.config("max_tokns: 5"),
        "my.yaml: unknown setting 'max_tokns': did you mean 'max_tokens'?",
    ),
    "invalid YAML": (lambda p: p.config("models: [pythia\nseeds: 3"), "my.yaml, line 2: not valid YAML"),
    "YAML without keys": (lambda p: p.config("just a sentence"), "a YAML mapping of settings is needed"),
    "wrong type in YAML": (lambda p: p.config("max_tokens: many"), "max_tokens is 'many': it must be a whole number"),
    "no list in YAML": (lambda p: p.config("models: pythia"), "models is 'pythia': it must be a list"),
    "key without a value": (lambda p: p.config("warmup_ratio:"), "my.yaml: warmup_ratio has no value"),
    "list without a value": (lambda p: p.config("models:"), "my.yaml: models has no value: give it one, or leave"),
    "choice without a value": (lambda p: p.config("precision: null"), "my.yaml: precision has no value"),
    "no such choice in YAML": (lambda p: p.config("precision: bf17"), "my.yaml: unknown precision 'bf17': did you"),
    "no such day": (lambda p: p.config("seeds: [0]\nname: 2024-02-30"), "my.yaml, line 2: not valid YAML: day is out"),
    "key twice": (
        lambda p: p.config("lr: 1\nmodels: [gqa]\nlr: 2"),
        "my.yaml, line 3: not valid YAML: lr is there twice",
    ),
    "list for a key": (lambda p: p.config("? [lr]\n: 1"), "my.yaml, line 1: not valid YAML: found unhashable key"),
    "no whole number": (lambda p: p.config("max_tokens: !!int foo"), "my.yaml, line 1: not valid YAML: invalid"),
    "5,000 digits": (lambda p: p.config(f"max_tokens: {'9' * 5000}"), "my.yaml, line 1: not valid YAML: Exceeds"),
    "1,000 brackets": (lambda p: p.config(f"models: {'[' * 1000}"), "my.yaml: not valid YAML: nested too deeply"),
    "config not UTF-8": (lambda p: p.config(b"name: \xff\xfe"), "not UTF-8 text"),
    # data
    "no such file": (["data", "prepare", "--data", "nothing.txt"], "nothing.txt: no such file or folder"),
    "empty file": (lambda p: p.data("empty.txt", ""), "no text in it"),
    "empty folder": (
        lambda p: ["data", "show", "--data", p.empty_folder("texts")],
        "no file in this folder ends in .txt",
    ),
    "unknown kind of file": (lambda p: p.data("letter.docx", "x"), "cannot read this kind of file; supported: .txt"),
    "pipe for a text": (
        lambda p: ["data", "prepare", "--data", p.pipe("a.txt")],
        "a.txt is a pipe or a device, which cannot be read twice: make it a file",
    ),
    "bad line": (lambda p: p.data("a.jsonl", '{"text": "a"}\n{"text": \n'), "a.jsonl, line 2: not valid JSON"),
    "5,000 digits in JSON": (lambda p: p.data("a.jsonl", f'{{"n": {"9" * 5000}}}'), "a.jsonl, line 1: not readable as"),
    "deep JSON": (lambda p: p.data("a.jsonl", "[" * 100_000), "a.jsonl, line 1: not readable as JSON: maximum"),
    "no such user": (["data", "prepare", "--data", "~nobody-here/a.txt"], "~nobody-here/a.txt: no such file or folder"),
    "no text field": (lambda p: p.data("a.jsonl", '{"body": "a"}\n'), "no field 'text'; fields: body"),
    "text not UTF-8": (lambda p: p.data("a.txt", b"caf\xe9 " * 999), "not UTF-8 text (byte 3)"),
    "truncated zst": (lambda p: p.data("a.jsonl.zst", p.zst()), "truncated zstd file"),
    "damaged zst": (lambda p: p.data("a.jsonl.zst", b"no zstd at all"), "damaged zstd file"),
    "broken parquet": (lambda p: p.data("a.parquet", b"PAR1 and then nothing"), "not a readable parquet file"),
    "corpus too small": (lambda p: p.data("a.txt", "Just one sentence."), "too little text"),
    "data set without network": (
        ["data", "prepare", "--data", "hf:nobody/nothing"],
        "cannot reach the Hugging Face hub",
    ),
    "the Pile without network": (["data", "prepare", "--data", "pile"], "cannot reach the Hugging Face hub"),
    "tokenizer without network": (
        lambda p: ["data", "prepare", "--data", p.texts(), "--tokenizer", "nobody/nothing"],
        "use --tokenizer bpe",
    ),
    "folder without tokenizer": (
        lambda p: ["data", "prepare", "--data", p.texts(), "--tokenizer", p.empty_folder("none")],
        "this folder holds no tokenizer",
    ),
    "file in place of a tokenizer": (
        lambda p: ["data", "prepare", "--data", p.texts(), "--tokenizer", p.file("tokenizer.json", "{}")],
        "tokenizer.json is a file: give a folder as save_pretrained writes it, a name or bpe",
    ),
    "pipe for a tokenizer": (
        lambda p: ["data", "prepare", "--data", p.texts(), "--tokenizer", p.pipe("tokenizer")],
        "tokenizer is a file: give a folder",
    ),
    "vocabulary too small": (lambda p: ["data", "prepare", "--vocab-size", "100"], "--vocab-size is 100"),
    "vocabulary too large": (["data", "prepare", "--vocab-size", "9999999"], "--vocab-size is 9999999: it must be at"),
    "cache is a file": (
        lambda p: ["data", "prepare", "--data", p.texts(), *as_flags(**TEXT), "--cache-dir", p.file("cache", "")],
        "choose another folder with --cache-dir",
    ),
    # plugins
    "no plugin": (["check", "--plugin", "none.py"], "plugin none.py not found"),
    "syntax error in plugin": (
        lambda p: ["check", "--plugin", p.file("a.py", "x = 1\ndef f(:\n")],
        "a.py, line 2: SyntaxError",
    ),
    "plugin without layers": (lambda p: ["check", "--plugin", p.file("a.py", "x = 1")], "registers no layer"),
    "plugin that fails": (
        lambda p: p.train("--plugin", p.file("a.py", "x = 1 / 0")),
        "a.py, line 1: ZeroDivisionError",
    ),
    "plugin that asserts": (
        lambda p: ["check", "--plugin", p.file("a.py", "x = 1\nassert False")],
        "a.py, line 2: AssertionError",
    ),
    "plugin that exits": (
        lambda p: ["check", "--plugin", p.file("a.py", "raise SystemExit(0)")],
        "a.py, line 1: SystemExit: 0",
    ),
    "plugin with a class that is no layer": (
        lambda p: p.plugin("@register_layer('b')\nclass B: pass"),
        "a.py, line 2: @register_layer('b') needs a subclass of Layer, which B is not",
    ),
    "plugin with the name of a preset": (
        lambda p: p.plugin("@register_layer('gqa')\nclass B(Layer): pass"),
        "a.py, line 2: layer type 'gqa': a preset has that name already",
    ),
    "plugin with the name of a preset of ours": (
        lambda p: p.plugin("register_preset('mqa', [{'type': 'pythia'}])"),
        "a.py, line 2: preset 'mqa': a layer type or preset has that name already",
    ),
    "plugin with a preset of a layer's name": (
        lambda p: p.plugin("register_preset('infini', [{'type': 'pythia'}])"),
        "preset 'infini': a layer type or preset has that name already",
    ),
    # saved models and results
    "no model folder": (["generate", "runs/none", "--prompt", "a"], "runs/none: no such folder"),
    "file in place of a model": (
        lambda p: ["generate", p.file("a.txt", "b"), "--prompt", "a"],
        "a.txt is a file: give a run folder, a model folder, or the name of a preset",
    ),
    "no run folder": (["evaluate", "runs/none"], "runs/none: no such folder"),
    "file in place of a run folder": (
        lambda p: ["evaluate", p.file("a.txt", "b")],
        "a.txt is a file: give the folder of a trained model",
    ),
    "folder without a model": (lambda p: ["check", p.empty_folder("none")], "expected a run folder"),
    "nothing to measure": (
        lambda p: ["evaluate", p.empty_folder("none"), "--tasks", "efficiency"],
        "none: expected a run folder",
    ),
    "run of Vintix": (
        lambda p: ["evaluate", p.run_of("environment: pendulum")],
        "is a run of newllm vintix, which newllm vintix evaluate measures",
    ),
    "run with a setting of another type": (
        lambda p: ["evaluate", p.run_of("seq_length: abc")],
        "config.yaml: seq_length is 'abc': it must be a whole number",
    ),
    "run with a list for a plugin": (
        lambda p: ["check", p.run_of("plugin: [5]")],
        "config.yaml: plugin is '[5]': it must be text",
    ),
    "run whose plugin has gone": (
        lambda p: ["generate", p.run_of("plugin: gone.py"), "--prompt", "a"],
        "run was trained: say where it is now with --plugin FILE.py",
    ),
    "model of another kind": (lambda p: ["check", p.model(NEOX, b"")], "holds a 'gpt_neox' model"),
    "truncated weights": (lambda p: ["check", p.truncated_model()], "cannot load the model"),
    "unknown task": (
        lambda p: ["evaluate", p.empty_folder("run"), "--tasks", "perplexty"],
        "did you mean 'perplexity'?",
    ),
    "no results": (lambda p: ["report", p.empty_folder("none")], "results.json does not exist"),
    "truncated results": (
        lambda p: ["report", str(Path(p.file("results.json", '{"name": "a", ')).parent)],
        "perhaps cut off",
    ),
    "nothing to check": (["check"], "nothing to check: give a MODEL folder"),
    # output
    "run folder with other files": (
        lambda p: p.train("--out", "."),
        "holds other files: choose an empty or new folder",
    ),
    "run folder is a file": (lambda p: p.train("--out", p.file("taken", "")), "taken"),
    "run folder below a file": (lambda p: p.train("--out", p.file("taken", "") + "/run"), "taken"),
    "result folder is a file": (lambda p: p.compare("--out", p.file("taken", "")), "taken"),
    "result folder below a file": (lambda p: p.compare("--out", p.file("taken", "") + "/results"), "taken"),
    # comparisons
    "unknown preset in a comparison": (lambda p: p.compare("--models", "pythia", "mqaa"), "did you mean 'mqa'?"),
    "layer type that no plugin brings": (lambda p: p.compare("--models", "my_layer"), "unknown model 'my_layer'"),
    "no plugin for a comparison": (lambda p: p.compare("--plugin", "none.py"), "plugin none.py not found"),
    "every run fails": (
        lambda p: p.compare("--lr", "1e30", "--out", str(p.folder / "out")),
        "the training loss is nan",
    ),
    "benchmark without steps": (["bench", "train", "--steps", "0"], "--steps is 0"),
    "benchmark with nothing to predict": (["bench", "train", "--seq-lengths", "9", "1"], "--seq-lengths is [9, 1]: a"),
    "seed of a benchmark": (["bench", "lagged", "--seeds", "-1"], "--seeds is [-1]: a seed is a whole number from 0"),
    "benchmark of an unknown model": (["bench", "decode", "--models", "pythai"], "did you mean 'pythia'?"),
    # training and generation
    "learning rate far too high": (lambda p: p.train("--lr", "1e30"), "the training loss is nan"),
    "unknown cache precision": (
        lambda p: ["evaluate", p.empty_folder("run"), "--cache-precision", "int8", "int3"],
        "unknown cache_precision 'int3': did you mean 'int8'?",
    ),
    "cache precision without perplexity": (
        lambda p: ["evaluate", p.empty_folder("run"), "--tasks", "efficiency", "--cache-precision", "int8"],
        "--cache-precision belongs to the perplexity task",
    ),
    "stride without context": (lambda p: ["evaluate", p.run(), "--sliding-stride", "16"], "--sliding-stride 16"),
    "nothing to adapt": (["adapt", "runs/none"], "no model in runs/none"),
    "another kind of model to adapt": (
        lambda p: ["adapt", p.model({"model_type": "llama"}, b"")],
        "config.json is not that of a model with layers of newllm, nor of a GPT-NeoX",
    ),
    "a GPT-NeoX to adapt that does not say its size": (
        lambda p: ["adapt", p.model(NEOX, b"")],
        "config.json does not say how large the model is ('hidden_size')",
    ),
    "a model to adapt with layers that are none": (
        lambda p: ["adapt", p.model({"model_type": "newllm", "layer_specs": [dict.fromkeys(SIZES, 64), 5]}, b"")],
        "config.json is not that of a model with layers of newllm, nor of a GPT-NeoX",
    ),
    "another size than that of the model to adapt": (
        lambda p: [
            *["adapt", p.model({"model_type": "newllm", "layer_specs": [dict.fromkeys(SIZES, 64)] * 2}, b"")],
            *["--hidden-size", "32", "--num-heads", "8"],
        ],
        "--hidden-size is 32: the model in",
    ),
    "another split of the text trained on": (
        lambda p: ["evaluate", p.run_of(f"data: {p.texts()}"), "--test-share", "0.5"],
        "another split holds out what it has read: leave it as it was, or give other text with --data",
    ),
    "start from a run on another split of its text": (
        lambda p: [
            *["compare", "--data", p.texts(), "--test-share", "0.5"],
            *["--start-from", p.run_of(f"data: {p.texts()}")],
        ],
        "another split holds out what it has read: leave it as it was, or give other text with --data",
    ),
    "start from the weights of a run on another split of its text": (
        lambda p: [
            *["compare", "--data", p.texts(), "--test-share", "0.5"],
            *["--start-from", f"{p.run_of(f'data: {p.texts()}')}/model"],
        ],
        "another split holds out what it has read: leave it as it was, or give other text with --data",
    ),
    "empty prompt": (["generate", "gqa", "--prompt", ""], "the prompt is empty"),
    "prompt not UTF-8": (["generate", "gqa"], "standard input is not UTF-8"),
    "negative temperature": (["generate", "gqa", "--prompt", "a", "--temperature", "-1"], "--temperature is -1.0"),
    "temperature near 0": (["generate", "gqa", "--prompt", "a", "--temperature", "1e-40"], "at least 1e-06, or 0 for"),
    "more threads than any machine has": (
        ["generate", "gqa", "--prompt", "a", "--threads", "100000"],
        "--threads is 100000: it must be at most 1024",
    ),
    "no threads": (["generate", "gqa", "--prompt", "a", "--threads", "0"], "--threads is 0: it must be greater than 0"),
    "threads to show a memory": (["memory", "show", "x", "--model", "y", "--threads", "-1"], "--threads is -1"),
    "seed of a text": (["generate", "gqa", "--prompt", "a", "--seed", "-1"], "--seed is -1: a seed is a whole number"),
    "prompt no UTF-8": (["generate", "gqa", "--prompt", "a\udce9"], "--prompt is 'a\\udce9': it must be UTF-8 text"),
    "top-p of 0": (["generate", "gqa", "--prompt", "a", "--top-p", "0"], "--top-p is 0.0"),
    "no tokens to generate": (["generate", "gqa", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
}


def assert_one_line(stderr: str, fragment: str) -> None:
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("newllm: error: ")
    assert fragment in lines[0]


@pytest.mark.parametrize("name", CASES)
def test_wrong_input(name, tmp_path, monkeypatch, capsys):
    if name == "no such device" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEWLLM_CACHE", str(tmp_path / "newllm-cache"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    command, fragment = CASES[name]
    argv = command(Place(tmp_path)) if callable(command) else command
    capsys.readouterr()
    assert cli.main(argv) == 2
    assert_one_line(capsys.readouterr().err, fragment)


@pytest.mark.parametrize("argv", [["generate", "gqa"], ["memory", "ask", "model", "file"]])
def test_closed_standard_input_is_an_empty_one(argv, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)
    assert cli.main(argv) == 2
    assert_one_line(capsys.readouterr().err, "the prompt is empty")


@pytest.mark.parametrize("name", ["unknown command", "misspelt key", "no such file", "no plugin", "no model folder"])
def test_wrong_input_in_a_process_of_its_own(name, tmp_path):
    command, fragment = CASES[name]
    argv = command(Place(tmp_path)) if callable(command) else command
    process = subprocess.run([sys.executable, "-m", "newllm.cli", *argv], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2
    assert_one_line(process.stderr, fragment)
