"""To and from Hugging Face's GPT-NeoX, so that real Pythia checkpoints load here and go back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from newllm.errors import UserError, first_line
from newllm.models.factory import load_model, model_config
from newllm.models.transformer import TransformerLM
from newllm.paths import model_folder

# Our name → theirs, in each layer; qkv differs in its row order and is converted apart.
_LAYER = {
    "norm_attention": "input_layernorm",
    "norm_mlp": "post_attention_layernorm",
    "qkv": "attention.query_key_value",
    "out": "attention.dense",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}
_MODEL = {
    "embed.weight": "gpt_neox.embed_in.weight",
    "norm.weight": "gpt_neox.final_layer_norm.weight",
    "norm.bias": "gpt_neox.final_layer_norm.bias",
    "head.weight": "lm_head.weight",
}


def from_gpt_neox(model: GPTNeoXForCausalLM) -> TransformerLM:
    """The same model as layers of type 'pythia': equal logits, weights copied.

    Raises UserError for a variant that PythiaLayer is not: no attention bias, other activations.
    """
    theirs = model.config
    expected = {"attention_bias": True, "hidden_act": "gelu", "layer_norm_eps": 1e-5}
    for name, value in expected.items():
        if getattr(theirs, name) != value:
            raise UserError(f"cannot convert GPT-NeoX with {name}={getattr(theirs, name)}: only {name}={value}")
    rope: dict = theirs.rope_parameters  # type: ignore[assignment]
    if rope["rope_type"] != "default":
        raise UserError(f"cannot convert GPT-NeoX with rope_type={rope['rope_type']}: only 'default'")
    config = model_config(
        "pythia",
        hidden_size=theirs.hidden_size,
        num_layers=theirs.num_hidden_layers,
        num_heads=theirs.num_attention_heads,
        intermediate_size=theirs.intermediate_size,
        vocab_size=theirs.vocab_size,
        position={"type": "rope", "fraction": rope["partial_rotary_factor"], "base": float(rope["rope_theta"])},
        parallel_residual=theirs.use_parallel_residual,
        tie_word_embeddings=theirs.tie_word_embeddings,
        bos_token_id=theirs.bos_token_id,
        eos_token_id=theirs.eos_token_id,
        pad_token_id=theirs.pad_token_id,
    )
    ours = TransformerLM(config).to(device=model.device, dtype=model.dtype)  # type: ignore[call-arg]
    state = model.state_dict()
    heads = theirs.num_attention_heads
    ours.load_state_dict({name: _from(state[their], name, heads) for name, their in _names(ours)})
    return ours.train(model.training)


def trained_folder(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """Where the weights and config.json of a run folder or model folder are, and what the latter says.

    Raises UserError where there is none, or it is of another kind than newllm's and GPT-NeoX.
    """
    path = model_folder(folder)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if config["model_type"] == "gpt_neox" or {*map(type, config["layer_specs"])} == {dict}:
            return path, config
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path}: config.json is not that of a model with layers of newllm, nor of a GPT-NeoX")


def trained_shape(folder: str | Path) -> dict[str, int]:
    """The arguments of `create_model` that give a model the size of the one in the folder."""
    path, config = trained_folder(folder)
    try:
        if config["model_type"] == "gpt_neox":
            names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
            sizes = [int(config[name]) for name in names]
        else:
            first = config["layer_specs"][0]
            sizes = [first["hidden_size"], len(config["layer_specs"]), first["num_heads"], first["intermediate_size"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: config.json does not say how large the model is ({error})") from error
    return dict(zip(("hidden_size", "num_layers", "num_heads", "intermediate_size"), sizes, strict=True))


def trained_residuals(folder: str | Path) -> list[bool]:
    """Of each layer of the model in the folder whether attention and MLP read the same, see `PythiaLayer`."""
    _, config = trained_folder(folder)
    if config["model_type"] == "gpt_neox":
        return [bool(config.get("use_parallel_residual", True))] * int(config["num_hidden_layers"])
    return [bool(spec.get("parallel_residual", True)) for spec in config["layer_specs"]]


def load_trained(folder: str | Path) -> TransformerLM:
    """A model saved by newllm, or a GPT-NeoX in Hugging Face's format as one of layers of type 'pythia'.

    Raises UserError where there is none, or it cannot be read.
    """
    path, config = trained_folder(folder)
    if config["model_type"] != "gpt_neox":
        return load_model(path)
    try:
        theirs = GPTNeoXForCausalLM.from_pretrained(path, local_files_only=True, use_safetensors=True)
    except Exception as error:  # safetensors and transformers raise many kinds for a damaged file
        raise UserError(f"cannot load the model in {path}: {first_line(error)}") from error
    return from_gpt_neox(theirs)


def to_gpt_neox(model: TransformerLM) -> GPTNeoXForCausalLM:
    """The way back: bit-equal weights. Raises UserError where GPT-NeoX has no such model."""
    specs, ours, names = model.config.layer_specs, model.state_dict(), _names(model)
    # By the weights too: a model that feeds a state back, or goes through its layers again, has more of them.
    equal = bool(specs) and specs[0]["type"] == "pythia" and all(spec == specs[0] for spec in specs)
    if not equal or ours.keys() != {name for name, _ in names}:
        raise UserError("only a model of equal 'pythia' layers, and nothing else, has a GPT-NeoX form")
    first = specs[0]
    position = first["position"]
    if model.config.layer_norm_eps != 1e-5:  # GPT-NeoX has one for all norms, and those of the layers have 1e-5
        raise UserError(f"no GPT-NeoX form with layer_norm_eps={model.config.layer_norm_eps}: only 1e-05")
    if position["type"] != "rope" or first["window"] is not None or first["num_kv_heads"] != first["num_heads"]:
        raise UserError("GPT-NeoX has rotary positions, no window and as many key as query heads: this model differs")
    config = GPTNeoXConfig(
        vocab_size=model.config.vocab_size,
        hidden_size=model.config.hidden_size,
        num_hidden_layers=len(specs),
        num_attention_heads=first["num_heads"],
        intermediate_size=first["intermediate_size"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": position["base"],
            "partial_rotary_factor": position["fraction"],
        },
        use_parallel_residual=first["parallel_residual"],
        tie_word_embeddings=model.config.tie_word_embeddings,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    theirs = GPTNeoXForCausalLM(config).to(device=model.device, dtype=model.dtype)  # type: ignore[call-arg]
    theirs.load_state_dict({their: _to(ours[name], name, first["num_heads"]) for name, their in names})
    return theirs.train(model.training)


def _names(model: TransformerLM) -> list[tuple[str, str]]:
    """(our parameter name, theirs) for every parameter."""
    pairs = list(_MODEL.items())
    for n in range(len(model.layers)):
        for our, their in _LAYER.items():
            pairs += [
                (f"layers.{n}.{our}.{part}", f"gpt_neox.layers.{n}.{their}.{part}") for part in ("weight", "bias")
            ]
    return pairs


def _from(tensor: Tensor, name: str, heads: int) -> Tensor:
    """GPT-NeoX stacks (q, k, v) head by head; here all q, then all k, then all v."""
    return tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2) if ".qkv." in name else tensor


def _to(tensor: Tensor, name: str, heads: int) -> Tensor:
    return tensor.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2) if ".qkv." in name else tensor
