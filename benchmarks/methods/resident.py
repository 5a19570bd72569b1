"""All weights on the device, as `pipe.to("cuda")` leaves them: what everything is compared with."""

from benchmarks.methods.base import Method, Setup, move
from benchmarks.records import tensors_of


def _apply(setup: Setup) -> None:
    move(tensors_of(list(setup.work.modules.values())), setup)


RESIDENT = Method("resident", _apply)
