"""TransformerLM: an ordinary Hugging Face language model whose layers are any mix of registered layer types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from newllm.errors import UserError
from newllm.models.cache import LMCache, adopt
from newllm.models.config import LMConfig
from newllm.models.layers.base import Layer, create_layer
from newllm.models.linear import Linear
from newllm.models.memory import HoldsMemory
from newllm.models.reconstruction import Reconstruction
from newllm.ops.loss import IGNORED, linear_cross_entropy


class TransformerLM(HoldsMemory, PreTrainedModel, GenerationMixin):
    """Embedding, layers, final LayerNorm, head; and a memory between calls, where layers have one.

    Args:
        config: the configuration; or
        layers: layer objects, from which the configuration is derived, with the other fields of LMConfig as keywords:
            TransformerLM(layers=[PythiaLayer(512, 8, 2048) for _ in range(6)], vocab_size=50304)
            They get the initial weights of a model of this configuration, whatever weights they had, unless they are
            those of a model already: load weights into the model, not into the layers.

    Raises:
        UserError: for neither of them.
    """

    config_class = LMConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = False
    accepts_loss_kwargs = True  # the Trainer then passes num_items_in_batch
    _is_stateful = True  # some states cannot be rolled back: no assisted decoding
    _tied_weights_keys = {"head.weight": "embed.weight"}  # noqa: RUF012 (a class attribute transformers defines this way)

    def __init__(self, config: LMConfig | None = None, *, layers: Sequence[Layer] | None = None, **options) -> None:
        if config is None:
            if not layers:
                raise UserError("a TransformerLM is made of a config, or of at least one layer: give one of them")
            hidden_size = layers[0].spec["hidden_size"]
            specs = [layer.spec for layer in layers]
            config = self.config_class(hidden_size=hidden_size, layer_specs=specs, **options)
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # the Trainer then counts num_items_in_batch over labels[:, 1:]
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layers if layers is not None else map(create_layer, config.layer_specs))
        config.layer_specs = [layer.spec for layer in self.layers]  # type: ignore[misc]  # complete, defaults included
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self._memory = {}
        self.post_init()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # Not in _init_weights, which transformers skips where a module has no parameters of its own: a layer may also
        # want other initial values for its parts.
        fresh = not getattr(module, "_is_hf_initialized", False)
        super()._initialize_weights(module, is_custom_code)
        loaded = all(getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters())
        if not fresh or loaded:
            return
        if isinstance(module, Layer):
            module.reset_parameters()
        elif module is self.embed and self.config.embedding_std is not None:
            nn.init.normal_(self.embed.weight, std=self.config.embedding_std)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head = new_embeddings  # type: ignore[assignment]

    @property
    def state_size(self) -> int:
        """Numbers N of the state that the model feeds back to itself; 0 where it does not (see `RecurrentLM`)."""
        return 0

    def state_bytes(self, tokens: int, element_size: int) -> list[int]:
        """Closed form of the bytes that each state of one row's cache holds after `tokens` tokens."""
        return [layer.state_bytes(tokens, element_size) for layer in self.layers]  # type: ignore[operator]

    def make_cache(self, precision: str | None = None) -> LMCache:
        """A cache that has read nothing: one state for each layer. Outside training it starts from the model's memory.

        Args:
            precision: 'model', 'int8' or 'int4', see `ops.quantize`; None is the configuration's `cache_precision`.
        """
        states = [layer.make_state() for layer in self.layers]  # type: ignore[operator]
        cache = LMCache(states, self.config.cache_precision if precision is None else precision)
        cache.made_for = self._kind_of_states
        self._start_from_memory(cache)
        return cache

    @property
    def _kind_of_states(self) -> Any:
        """Equal for models whose caches can take each other's place."""
        return type(self), self.config.layer_specs, self.state_size, getattr(self, "num_passes", 1)

    def hidden_states(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states (B, T, D), after the last LayerNorm; arguments as in `forward`.

        Where the configuration quantises the model's caches, their cost belongs to the model: outside training it reads
        through one even when none is given, so that its losses and logits are those it generates by. The same is true
        of a memory that it holds.
        """
        _check_read(input_ids, inputs_embeds)
        if past_key_values is None and not self._reads_without_cache():
            past_key_values = self.make_cache()
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        positions, mask = self._places(x, attention_mask, position_ids, past_key_values)
        states = None if past_key_values is None else past_key_values.layers
        return self.norm(self.run_layers(x, positions=positions, mask=mask, states=states))

    def run_layers(self, x: Tensor, *, positions: Tensor, mask: Tensor | None, states: Sequence[Any] | None) -> Tensor:
        """All layers, one after the other, (B, T, D) to (B, T, D), each with its own of `states`, or all without."""
        if x.shape[1] == 0:  # the contract gives a layer one token at least
            return x
        for layer, state in zip(self.layers, [None] * len(self.layers) if states is None else states, strict=True):
            x = layer(x, positions=positions, mask=mask, state=state)
        return x

    def _reads_without_cache(self) -> bool:
        """Whether reading without a cache is the same as through a fresh one."""
        return (self.training or self.config.cache_precision == "model") and not self._holds_memory()

    def _places(
        self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past_key_values: Cache | None
    ) -> tuple[Tensor, Tensor | None]:
        """Positions (B, T) and mask (B, S) or None of a chunk x (B, T, …), as the layers take them.

        Raises UserError for an attention mask of another shape than `forward` says.
        """
        B, T = x.shape[:2]
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if attention_mask is not None and attention_mask.shape not in ((B, T), (B, seen + T)):
            valid = " or ".join(f"{B} × {tokens}" for tokens in dict.fromkeys((T, seen + T)))
            given = " × ".join(map(str, attention_mask.shape)) or "a single number"
            raise UserError(f"attention_mask is {given}: it must be rows × tokens, here {valid}, 1 for real tokens")
        mask = None if attention_mask is None else attention_mask.bool()
        if mask is not None and mask.shape[1] == T and seen:
            mask = torch.cat([mask.new_ones(B, seen), mask], dim=1)
        if position_ids is None:
            if mask is None:
                position_ids = torch.arange(seen, seen + T, device=x.device)
            else:
                position_ids = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, seen:]
        return position_ids.expand(B, T), mask

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = True,
        update_memory: bool = False,
    ) -> CausalLMOutputWithPast | tuple:
        """One chunk of tokens.

        Args:
            input_ids: (B, T) token ids; or inputs_embeds (B, T, D).
            attention_mask: (B, S) over past and chunk, or (B, T) over the chunk alone if the past had no padding; 1 for
                real tokens. Padding may stand anywhere; a row reads on after it as if there were none.
            position_ids: (B, T) or (1, T); default: counted from each row's first real token.
            past_key_values: the model's cache, or any empty Hugging Face cache, which then takes this model's states.
            use_cache: make a cache and return it. Outside training, a model whose configuration quantises its caches,
                or that holds a memory, reads through one either way.
            labels: (B, T), not shifted (Hugging Face's convention): token t + 1 is predicted from tokens ≤ t; −100 is
                ignored.
            logits_to_keep: compute logits of the last so many positions only; 0 for all.
            num_items_in_batch: number of targets the loss is divided by (gradient accumulation); default: all in this
                batch.
            return_dict: False gives a tuple instead of the output object.
            update_memory: what the model has read at the end of this call becomes its memory, of B rows.

        Returns:
            loss in nats per token (with labels), logits (B, T, V), past_key_values. In training mode with labels,
            logits is None: they are never all in memory.

        Raises:
            ValueError: for a gradient outside training, if the configuration quantises the caches.
            UserError: both input_ids and inputs_embeds, or neither; update_memory in training, with past_key_values, or
                without a layer that has a memory; an attention_mask of another shape; a cache of a fixed size, a
                quantised or offloaded one of Hugging Face, one of another model, or of other rows.
        """
        _check_read(input_ids, inputs_embeds)
        if update_memory:
            self._check_can_update(cached=past_key_values is not None)
            use_cache = True
        if past_key_values is None and use_cache and not (self.training and labels is not None):
            past_key_values = self.make_cache()
        if past_key_values is not None:
            rows = len(inputs_embeds if input_ids is None else input_ids)  # type: ignore[arg-type]
            past_key_values = adopt(past_key_values, self.make_cache, self._kind_of_states, rows)
        hidden = self.hidden_states(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        if update_memory:
            assert past_key_values is not None
            self._take_memory(past_key_values)
        loss = logits = None
        if labels is not None:
            loss = self.loss_of(hidden, labels, num_items_in_batch)
        if labels is None or not self.training:
            logits = self.head(hidden[:, -logits_to_keep:])
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return output.to_tuple() if return_dict is False else output

    def loss_of(self, hidden: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The training loss from final hidden states (B, T, D); labels and num_items_in_batch as of `forward`."""
        nats = linear_cross_entropy(hidden[:, :-1].flatten(0, 1), self.head.weight, labels[:, 1:].flatten(), "sum")
        return nats / ((labels[:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)

    def token_losses(self, input_ids: Tensor, cache_precision: str | None = None, **inputs) -> Tensor:
        """−log p(token t | tokens < t) in nats for t = 1 … T − 1: (B, T − 1) float32; never all logits in memory.

        Args:
            cache_precision: read through an empty cache of this precision. None reads as `forward` does.
        """
        if cache_precision is not None:
            inputs["past_key_values"] = self.make_cache(cache_precision)
        return self.losses_of(self.hidden_states(input_ids, **inputs), input_ids)

    def losses_of(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """`token_losses` from final hidden states (B, T, D)."""
        targets = input_ids[:, 1:]
        nats = linear_cross_entropy(hidden[:, :-1].flatten(0, 1), self.head.weight, targets.flatten(), "none")
        return nats.view(targets.shape)

    def reconstruction(self) -> Reconstruction | None:
        """The first phase of training, for a model with layers that have one."""
        return Reconstruction(self) if any(layer.reconstruction_parameters() for layer in self.layers) else None  # type: ignore[operator]

    def frozen_parameters(self) -> list[nn.Parameter]:
        """What training as a language model leaves as a phase before it, or its initialisation, has made it."""
        return [parameter for layer in self.layers for parameter in layer.reconstruction_parameters()]  # type: ignore[operator]

    def freeze_first_phase(self) -> None:
        """For training as a language model: all but `frozen_parameters` gets gradients."""
        self.requires_grad_(True)
        for parameter in self.frozen_parameters():
            parameter.requires_grad_(False)


def _check_read(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
    """Raises UserError for both, of which one would be read and the other not, and for neither."""
    if (input_ids is None) == (inputs_embeds is None):
        raise UserError("a model reads input_ids or inputs_embeds: give one of them")


ARCHITECTURES: dict[str, type[TransformerLM]] = {}

M = TypeVar("M", bound=type[TransformerLM])


def register_architecture(name: str) -> Callable[[M], M]:
    """Class decorator: presets name the kind of model by it, and Hugging Face's Auto classes find model and config.

    Its config_class has a model_type of its own.
    """

    def register(cls: M) -> M:
        ARCHITECTURES[name] = cls
        AutoConfig.register(cls.config_class.model_type, cls.config_class)
        AutoModelForCausalLM.register(cls.config_class, cls)
        return cls

    return register


register_architecture("transformer")(TransformerLM)
