"""Which token comes next: guidance, temperature and what is allowed, in the order in which they are applied."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        cfg_scale: how far from the logits without a prompt; 1 turns guidance off.
        temperature: of the softmax.
        top_k: only so many of the likeliest.
        top_p: only the likeliest that together have this probability.
    """

    cfg_scale: float = 7.0
    temperature: float = 1.0
    top_k: int = 2048
    top_p: float = 1.0


def next_token(logits: torch.Tensor, sampling: Sampling, *, first: int, last: int) -> torch.Tensor:
    """Draw a token [rows / 2] by the global generator of the device.

    Args:
        logits: [rows, ids]; the second half of the rows has no prompt.
        first: of the ids that may be drawn.
        last: behind those ids.
    """
    conditional, without = logits.float().chunk(2)
    scores = (without + sampling.cfg_scale * (conditional - without)) / sampling.temperature
    ids = torch.arange(scores.shape[-1], device=scores.device)
    scores = scores.masked_fill((ids < first) | (ids >= last), -torch.inf)
    least = scores.topk(min(sampling.top_k, last - first)).values[:, -1:]
    scores = scores.masked_fill(scores < least, -torch.inf)
    ordered, order = scores.softmax(-1).sort(descending=True)
    kept = ordered.cumsum(-1) - ordered < sampling.top_p
    drawn = torch.multinomial(ordered * kept, 1)
    return order.gather(-1, drawn)[:, 0]
