"""A device made of ordinary memory: the engine's stand-in for a GPU, and its harshest reader.

Used when there is no accelerator, and by every test. Compute runs at once (it is the CPU), but copies go to
a copy stream that may run them as late as the rules allow, so that an engine that forgot to wait computes
with NaN. `device.py` puts the parts together:

- `copies.py`: "at_once", "late" (only when something waits for them) or "random" (some prefix of the queue runs
  at each operation). Poison: from the moment a copy into a slot is issued, the slot holds NaN until the copy runs.
- `races.py`: within `checking()`, every operator that touches a slot is compared with the copies into it by
  vector clocks, as a race detector does. It catches the missing wait that happens to give the right values.
- `memory.py`: buffers, and within `checking()` or `accounting()` every storage that an operator makes, take device
  memory while they live; beyond `memory_bytes` or the cap, `SimulatedOutOfMemoryError`. Nothing is cached, so that
  reserved and allocated are the same. What an operator needs while it runs is not seen.
- `streams.py`: vector clocks, and simulated time: copies take `bytes / link`, `compute(ms)` takes what a test says;
  stalls follow.
- `page_locks.py`: the driver's rules for memory that is page-locked.
- *faults*: `fail_at(n, exc)` raises at the n-th device operation from now; the pairs of a copy are one each.
- *two places*: to torch both are "cpu", so that moving a module to the host cannot be seen by where its tensors end up.
  With `is_named_apart`, "cpu" is what user code calls the host, as it is beside a GPU.
"""

from layerstream.device.simulated.device import SimulatedDevice
from layerstream.device.simulated.memory import SimulatedOutOfMemoryError
from layerstream.device.simulated.page_locks import PAGE_BYTES
from layerstream.device.simulated.races import RaceError

__all__ = ["PAGE_BYTES", "RaceError", "SimulatedDevice", "SimulatedOutOfMemoryError"]
