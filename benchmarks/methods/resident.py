"""All weights on the device, as `pipe.to("cuda")` leaves them: what everything is compared with."""

from benchmarks.methods.base import Method, Setup, move, tensors_of


def _apply(setup: Setup) -> None:
    move(tensors_of(setup.work.modules.values()), setup)


RESIDENT = Method("resident", _apply)
