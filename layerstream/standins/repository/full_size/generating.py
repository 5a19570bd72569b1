"""Language models of a pipeline that generate so many tokens and no more, so that the work of a call is fixed."""

from typing import Any

import torch


def limited(base: Any) -> Any:
    """Return a class of the name of `base` whose `generate` stops after `most_new_tokens`, an attribute.

    With None there it generates what it is asked for. Otherwise an end token that random weights draw does not end it.
    With `pads_answer` what is missing of the length asked for is the beginning of the answer again.
    """

    def generate(self: Any, *args: Any, max_new_tokens: int, **kwargs: Any) -> torch.Tensor:
        if self.most_new_tokens is None:
            asked: torch.Tensor = base.generate(self, *args, max_new_tokens=max_new_tokens, **kwargs)
            return asked
        count = min(max_new_tokens, self.most_new_tokens)
        answer: torch.Tensor = base.generate(self, *args, max_new_tokens=count, min_new_tokens=count, **kwargs)
        if not self.pads_answer:
            return answer
        new = answer[:, kwargs["input_ids"].shape[1] :]
        missing = max_new_tokens - new.shape[1]
        again = new.repeat(1, missing // new.shape[1] + 1)[:, :missing]
        return torch.cat([answer, again], dim=1)

    names = {"__module__": base.__module__, "generate": generate, "most_new_tokens": None, "pads_answer": False}
    return type(base.__name__, (base,), names)
