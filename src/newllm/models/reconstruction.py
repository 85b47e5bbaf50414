"""The first phase of training, for models with layers that must first learn to reconstruct something of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from newllm.models.transformer import TransformerLM


class Reconstruction(nn.Module):
    """A model with another loss: the mean `reconstruction_loss` of its layers, each on its own parameters alone.

    It is trained and evaluated like a language model: `forward` gives the loss, `token_losses` that of every token.
    """

    def __init__(self, model: TransformerLM) -> None:
        super().__init__()
        self.model = model
        parameters = [layer.reconstruction_parameters() for layer in model.layers]  # type: ignore[operator]
        self.trained: list[nn.Parameter] = [parameter for own in parameters for parameter in own]
        self.depths = [depth for depth, own in enumerate(parameters) if own]

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """The mean loss over input_ids (B, T); what the text goes on with (labels) plays no part."""
        return {"loss": self._losses(input_ids).mean()}

    def token_losses(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """The loss at every token of input_ids (B, T) but the last, as of a language model: (B, T − 1)."""
        return self._losses(input_ids)[:, :-1]

    def _losses(self, input_ids: Tensor) -> Tensor:
        """(B, T), the mean over the layers that have a loss."""
        B, T = input_ids.shape
        positions = torch.arange(T, device=input_ids.device).expand(B, T)
        with torch.no_grad():
            x = self.model.embed(input_ids)
        losses = []
        for depth, layer in enumerate(self.model.layers[: self.depths[-1] + 1]):
            if depth in self.depths:
                losses.append(layer.reconstruction_loss(x))  # type: ignore[operator]
            if depth < self.depths[-1]:
                with torch.no_grad():  # a layer's loss is no matter of the layers before it
                    x = layer(x, positions=positions, mask=None, state=None)
        return torch.stack(losses).mean(dim=0)

    def freeze_the_rest(self) -> None:
        """For the first phase: only `trained` gets gradients."""
        self.model.requires_grad_(False)
        for parameter in self.trained:
            parameter.requires_grad_(True)
