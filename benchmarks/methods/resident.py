"""All weights on the device, as `pipe.to("cuda")` leaves them: what everything is compared with."""

import torch

from benchmarks.methods.base import Method, Setup, move
from benchmarks.records import tensors_of


def _apply(setup: Setup) -> None:
    move(tensors_of(list(setup.work.modules.values())), setup)
    pipe = setup.work.pipe
    for name, value in list(getattr(pipe, "__dict__", {}).items()):
        if isinstance(value, torch.device):  # it remembers where it was made, perhaps by a name of its own
            setup.undo.callback(setattr, pipe, name, value)
            setattr(pipe, name, setup.device)


RESIDENT = Method("resident", _apply)
