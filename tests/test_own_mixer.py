"""The README's own mixer works as printed, and four ways of breaking it are each named."""

import re
from pathlib import Path

import pytest

from newllm.cli import main
from newllm.models.layers import LAYER_TYPES

ROOT = Path(__file__).parents[1]
EXAMPLE = (ROOT / "examples" / "my_layer.py").read_text()


@pytest.fixture(autouse=True)
def _forget_plugin():
    yield
    LAYER_TYPES.pop("my_layer", None)


def code_of_readme() -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    return next(block for block in blocks if "register_layer" in block)


def check(tmp_path, capsys, code: str) -> tuple[int, str]:
    plugin = tmp_path / "my_layer.py"
    plugin.write_text(code)
    status = main(["check", "--plugin", str(plugin)])
    return status, capsys.readouterr().out


def test_readme_prints_the_example_file():
    assert code_of_readme().strip() in EXAMPLE


def test_it_keeps_the_contract_as_printed(tmp_path, capsys):
    status, out = check(tmp_path, capsys, code_of_readme())
    assert status == 0, out


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        (
            ".tril()",
            ".tril(1)",
            "leaks the future: changing token 1 changes the logits of token 0, 1 before it",
        ),
        (
            "return x + torch.sigmoid(self.gate(h)) * total",
            "total = total.mean(dim=0, keepdim=True)\n        return x + torch.sigmoid(self.gate(h)) * total",
            "mixes rows: changing row 1 changes the logits of row 0 from token 0 on",
        ),
        (
            "if before is not None:",
            "if False:",
            "cache and forward disagree: read token by token, the logits differ from reading all at once from token 1",
        ),
        (
            "real.cumsum(1)",
            "torch.ones_like(real).cumsum(1)",
            "padding moves the state: with 1 padded tokens left and 2 right of the first 12 tokens, the logits",
        ),
    ],
    ids=[
        "peeks one token ahead",
        "averages over the batch",
        "forgets its state between chunks",
        "fades while it reads padding",
    ],
)
def test_a_broken_variant_is_named(tmp_path, capsys, right, wrong, words):
    assert right in EXAMPLE
    status, out = check(tmp_path, capsys, EXAMPLE.replace(right, wrong))
    assert status == 1
    assert words in " ".join(out.split()), out
    # Only the true cause is a failure; what would follow from it is not judged.
    assert out.count("FAILED") == 1, out


def test_it_is_compared_without_touching_the_package(tmp_path):
    out = tmp_path / "out"
    arguments = "compare --models pythia my_layer --max-tokens 4096 --hidden-size 32 --num-heads 2 --num-layers 1"
    arguments += " --intermediate-size 32 --seq-length 64 --eval-tokens 2000 --evaluations 1 --efficiency false"
    main([*arguments.split(), "--plugin", str(ROOT / "examples" / "my_layer.py"), "--out", str(out)])
    assert "my_layer" in (out / "report.md").read_text()
    assert '"failed": []' in re.sub(r"\s+", " ", (out / "results.json").read_text())
