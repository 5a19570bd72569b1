"""All weights on the device, as `pipe.to("cuda")` leaves them: what everything is compared with."""

import torch

from benchmarks.methods.base import Method, Setup, move
from benchmarks.records import tensors_of


def _apply(setup: Setup) -> None:
    move(tensors_of(list(setup.work.modules.values())), setup)
    pipe = setup.work.pipe
    if isinstance(getattr(pipe, "__dict__", {}).get("device"), torch.device):  # it remembers where it was made
        setup.undo.callback(setattr, pipe, "device", pipe.device)
        pipe.device = setup.device


RESIDENT = Method("resident", _apply)
