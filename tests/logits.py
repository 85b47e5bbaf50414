"""Two models compared by what they say."""

import torch


def max_logit_difference(ours, theirs, input_ids):
    """Largest absolute difference of the two models' logits on input_ids (B, T)."""
    with torch.no_grad():
        return float((ours(input_ids).logits - theirs(input_ids).logits).abs().max())
