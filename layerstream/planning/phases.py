"""Which phase of the call runs, and what each takes on the device beside the weights. Pure.

A *phase* is a stretch of the call that uses the same components: the text encoder, the denoiser, the VAE. Denoisers
that take turns (a ControlNet and its UNet, two networks for guidance) are one phase, once they were seen to.

What a phase takes beside the weights, its *reserve*, is measured, not guessed, and remembered by *key*: component,
entry point, shapes and dtypes of what is passed. A key that was never measured gets all the room there is. Shapes that
are no larger than measured ones borrow their reserve until they were measured themselves; shapes that grow token by
token stay one key, which is measured again before what it takes can have grown by a quarter.

That a component runs many times a call is known of denoisers, and learned of others: a language model that writes a
prompt anew, or draws an image token by token, runs in a *loop*.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from layerstream.planning.phase_plan import MANY_PASSES, Phase

Shapes = tuple[tuple[Hashable, tuple[int, ...]], ...]  # (dtype, shape) of every tensor passed

# The entry of a component whose weights are read while nothing runs: by somebody who looks at them, which says nothing
# of what follows, or by a part of it that was called and is not known yet, whose name is in the place of a dtype.
READ = "(weights)"
# In the shapes of a call beside which another one runs, before those of the other.
BESIDE = "beside"
# What is kept for a loop is so much more than it took. Attention without a cache takes the square of its tokens.
GROWTH = 1.25
_LONGER = GROWTH**0.5
# A turn this long (in passes) or longer is a phase of its own; components that alternate faster share one.
_MOST_PASSES_PER_TURN = 4
# A text encoder runs once or twice in a turn. What runs more often than this in one is in a loop.
_PASSES_OF_A_LOOP = 8
# So often components that are not repeated take turns within one call before they are taken to share a loop.
_TURNS_OF_A_LOOP = 4
_MOST_TURNS = 16
_MEASUREMENTS = 2
_TIMED_PASSES = 3
_MOST_KEYS = 4096  # an application that makes images of every size must not grow without end


@dataclass(frozen=True, slots=True)
class Key:
    """One way of calling a component.

    Attributes:
        entry: "" for its forward, else the name of the part that was called.
        is_grad: autograd records, and keeps activations that are freed at once otherwise.
    """

    component: str
    entry: str
    shapes: Shapes
    is_grad: bool = False

    @property
    def is_look(self) -> bool:
        """Whether somebody looks at weights, and calls nothing."""
        return self.entry == READ and not self.shapes

    @property
    def may_pad(self) -> bool:
        """Whether a mask, or ids that one is made of, may be passed: what it takes then depends on the prompt."""
        return not all("float" in str(dtype) for dtype, _ in self.shapes)

    def is_alike(self, other: Key) -> bool:
        """Same entry, and the same tensors but for their sizes."""
        return (
            self.component == other.component
            and self.entry == other.entry
            and self.is_grad == other.is_grad
            and [(d, len(s)) for d, s in self.shapes] == [(d, len(s)) for d, s in other.shapes]
        )

    def is_covered_by(self, other: Key) -> bool:
        """Alike, and no tensor is larger in any dimension."""
        return self.is_alike(other) and all(mine <= its for mine, its in self._sizes_beside(other))

    def is_a_token_after(self, other: Key) -> bool:
        """Alike, one longer in some dimensions, and little longer: the next step of a token loop, no second image."""
        if not self.is_alike(other):
            return False
        steps = {mine - its for mine, its in self._sizes_beside(other)}
        return steps <= {0, 1} and 1 in steps and self.growth_since(other) <= GROWTH

    def growth_since(self, other: Key) -> float:
        """How many times as long the dimension is that has grown most, of one that is alike."""
        return max((mine / max(its, 1) for mine, its in self._sizes_beside(other)), default=1.0)

    def _sizes_beside(self, other: Key) -> list[tuple[int, int]]:
        """Each dimension's size, and its size there."""
        return [
            sizes
            for (_, mine), (_, its) in zip(self.shapes, other.shapes, strict=True)
            for sizes in zip(mine, its, strict=True)
        ]


@dataclass(eq=False)
class CallKind:
    """All that is known of a kind of call: what it takes on the device beside our weights, its *reserve*, and how long
    its blocks compute.

    Attributes:
        key: component, entry and shapes that calls of this kind have.
        over_bytes: its reserve: reserved bytes beyond our weights and beyond what was allocated when it began; None:
            unknown.
        margin_bytes: kept beside that where there is room, since the allocator may cut its memory otherwise.
        is_measured: `over_bytes` is this key's own, not borrowed from a larger one.
        is_growing: its shapes grow token by token, so a quarter more is kept for it.
        num_missing: measurements until it is known. One is not enough where masks are passed: attention takes another
            way when a mask has padding, so a second prompt may take more than the first, in the same shapes.
        compute_ms: measured time of each unit's compute, by unit index; of one use. The least of a few passes: a host
            that is late, or a kernel that is loaded, shows in one of them as compute.
        num_untimed: passes to be timed yet.
        num_unread: of the timed ones, those whose times are not known yet.
    """

    key: Key
    over_bytes: int | None = None
    margin_bytes: int = 0
    is_measured: bool = False
    is_growing: bool = False
    num_missing: int = 1
    compute_ms: dict[int, float] = field(default_factory=dict)
    num_untimed: int = _TIMED_PASSES
    num_unread: int = 0
    _most_bytes: int = 0

    @property
    def known_bytes(self) -> int | None:
        """The best that is known of it: what was measured, be it once too few, or borrowed; None: nothing."""
        return self.over_bytes if self.over_bytes is not None else self._most_bytes or None

    @property
    def is_timed(self) -> bool:
        return self.num_untimed <= 0 and self.num_unread <= 0

    def starts_timing(self) -> None:
        """A pass is timed from now on. `timed` or `not_timed` is to follow, perhaps passes later."""
        self.num_untimed -= 1
        self.num_unread += 1

    def not_timed(self) -> None:
        """What a timed pass took will not be known."""
        self.num_unread -= 1
        self.num_untimed += 1

    def timed(self, compute_ms: Mapping[int, float]) -> None:
        """A timed pass took so much, by unit."""
        known = self.compute_ms
        self.compute_ms = {**known, **{u: min(ms, known.get(u, ms)) for u, ms in compute_ms.items()}}
        self.num_unread -= 1

    def kept_bytes(self, outside_bytes: int) -> int | None:
        """What a plan keeps free for it and for what others have. What a loop keeps of its tokens grows with it."""
        if self.over_bytes is None:
            return None
        kept = self.over_bytes + self.margin_bytes + outside_bytes
        return int(GROWTH * kept) if self.is_growing else kept

    def needed_bytes(self, outside_bytes: int) -> int | None:
        """With what an older plan still holds, when others have more: the room for tokens is there to be filled."""
        if self.over_bytes is None:
            return None
        own = self.over_bytes + self.margin_bytes
        return (int(GROWTH * own) if self.is_growing else own) + outside_bytes

    def measured(self, over_bytes: int, margin_bytes: int = 0) -> None:
        """It took so much: the larger of two measurements counts, and one above what was borrowed counts at once."""
        self._most_bytes = max(self._most_bytes, over_bytes)
        self.margin_bytes = margin_bytes
        self.num_missing -= 1
        if self.num_missing <= 0:
            self.over_bytes, self.is_measured = self._most_bytes, True
        elif self.over_bytes is not None:
            self.over_bytes = max(self.over_bytes, self._most_bytes)

    def forget(self) -> None:
        """It did not fit: the next time it gets all the room there is."""
        self.over_bytes, self.is_measured, self.num_missing, self._most_bytes = None, False, 1, 0
        self.margin_bytes = 0


class PhaseTracker:
    """Follows which components are entered with which keys. Pure: the streamer tells it, and it answers.

    Attributes:
        brief: components that are repeated, with fewer than `MANY_PASSES` passes in the last call of a pipeline with
            them.

    Args:
        components: (name, is_repeated) in the order of the pipeline.
    """

    def __init__(self, components: Sequence[tuple[str, bool]]) -> None:
        self._is_repeated = dict(components)
        self._groups: dict[str, tuple[str, ...]] = {name: (name,) for name in self._is_repeated}
        self._kinds: dict[Key, CallKind] = {}
        self._last_key: dict[tuple[str, str], Key] = {}
        self._turns: list[tuple[str, int]] = []  # (component, passes in a row), the most recent last
        self._is_in_use = False  # the turns are of one call of a pipeline
        self._num_passes: Counter[str] = Counter()  # in it
        self.brief: frozenset[str] = frozenset()
        self._entered: CallKind | None = None  # the most recent
        self._run: dict[tuple[str, ...], list[CallKind]] = {}  # reserves of the present, or last, run of each phase
        self._before: dict[tuple[str, ...], list[CallKind]] = {}  # of the run before
        self.current: tuple[str, ...] | None = None

    def enter(self, key: Key) -> CallKind:
        """A component is entered with `key`: its phase is the current one from now on."""
        self._take_turn(key.component)
        kind = self._kind(key)
        group = self._groups[key.component]
        if group != self.current:
            self._before[group] = self._run.get(group, [])
            self._run[group] = []
            self.current = group
        run = self._run[group]
        if not key.is_look and any(r.key.is_look for r in run):
            # What was read before the first call of a phase says nothing, and would keep it unknown.
            run = self._run[group] = [r for r in run if not r.key.is_look]
        if kind not in run and (not key.is_look or not run):
            run.append(kind)
        self._entered = kind
        return kind

    def again(self, component: str) -> None:
        """The same key as before is entered again."""
        self._take_turn(component)

    def begin_use(self, is_call: bool) -> None:
        """Somebody else uses the components now: what takes turns with what begins anew.

        Args:
            is_call: of a pipeline, rather than of a bare component.
        """
        self._is_in_use = is_call
        if is_call:
            counts = self._num_passes.items()
            brief = {c for c, count in counts if self._is_repeated[c] and count < MANY_PASSES}
            self.brief = self.brief - set(self._num_passes) | brief
            self._turns, self._num_passes = [], Counter()

    def forget(self, component: str) -> None:
        """What the calls of a component took says nothing of what follows."""
        self._kinds = {key: kind for key, kind in self._kinds.items() if key.component != component}
        self._last_key = {entry: key for entry, key in self._last_key.items() if key.component != component}
        for runs in (self._run, self._before):
            for group, kinds in runs.items():
                runs[group] = [kind for kind in kinds if kind.key.component != component]
        if self._entered is not None and self._entered.key.component == component:
            self._entered = None

    def is_repeated(self, component: str) -> bool:
        """Whether a component runs many times a call, as far as known."""
        return self._is_repeated[component]

    def phases(self, outside_bytes: int) -> tuple[Phase, ...]:
        """Every phase with its reserve as far as known, in the order of the components.

        Args:
            outside_bytes: what others than our weights have allocated on the device when the phase begins.
        """
        return tuple(
            Phase(
                group,
                any(self._is_repeated[c] for c in group),
                self._most(group, expected, outside_bytes, CallKind.kept_bytes),
                is_loop=any(r.is_growing for r in expected),
                is_brief=self.brief.issuperset(group),
            )
            for group, expected in self._all_expected()
        )

    def needed_bytes(self, outside_bytes: int) -> tuple[int | None, ...]:
        """What each of `phases` takes, without the room that a plan keeps for tokens to come."""
        return tuple(
            self._most(group, expected, outside_bytes, CallKind.needed_bytes)
            for group, expected in self._all_expected()
        )

    def compute_ms(self) -> Mapping[int, float]:
        """Measured compute by unit index, of the keys that are expected in each phase."""
        found: dict[int, float] = {}
        for _, expected in self._all_expected():
            for kind in expected:
                for unit, ms in kind.compute_ms.items() if kind.is_timed else ():
                    found[unit] = max(ms, found.get(unit, 0.0))
        return found

    def partners(self) -> tuple[str, ...] | None:
        """Components that take short turns with the current one, and are not one phase with it yet."""
        repeated: dict[str, int] = {}
        counts: dict[str, int] = {}
        are_repeated = True
        for component, passes in reversed(self._turns):
            are_repeated &= self._is_repeated[component]
            if passes >= _MOST_PASSES_PER_TURN or not (are_repeated or self._is_in_use):
                break
            for counted in (counts, repeated) if are_repeated else (counts,):
                counted[component] = counted.get(component, 0) + 1
        wanted = tuple(c for c in self._is_repeated if repeated.get(c, 0) >= 2 or counts.get(c, 0) >= _TURNS_OF_A_LOOP)
        is_new = len(wanted) >= 2 and self._turns[-1][0] in wanted and not set(wanted) <= set(self.current or ())
        return wanted if is_new else None

    def merge(self, components: Sequence[str]) -> None:
        """Make one phase of these components, which is the current one."""
        wanted = {c for name in components for c in self._groups[name]}
        group = tuple(c for c in self._is_repeated if c in wanted)
        old = list(dict.fromkeys(self._groups[c] for c in group))
        self._run[group] = [r for g in old for r in self._run.pop(g, [])]
        self._before[group] = [r for g in old for r in self._before.pop(g, [])]
        for component in group:
            self._groups[component] = group
        self.current = group

    def successor(self, components: Sequence[tuple[str, bool]], changed: Collection[str]) -> PhaseTracker:
        """A tracker of the pipeline's components as they are now; what was measured of `changed` ones is forgotten."""
        new = PhaseTracker(components)
        kept = {name for name, _ in components} - set(changed)
        new._kinds = {key: kind for key, kind in self._kinds.items() if key.component in kept}
        new._is_repeated |= {name: self._is_repeated[name] for name in kept if name in self._is_repeated}
        new._is_in_use, new.brief = self._is_in_use, self.brief & kept
        return new

    # ---- inside

    def _all_expected(self) -> list[tuple[tuple[str, ...], list[CallKind]]]:
        return [(group, self._expected(group)) for group in dict.fromkeys(self._groups.values())]

    def _expected(self, group: tuple[str, ...]) -> list[CallKind]:
        """The reserves that count: of the present run, and of the last one if this one began like it."""
        run, before = self._run.get(group, []), self._before.get(group, [])
        return list(dict.fromkeys([*run, *before])) if run and run[0] in before else run

    def _take_turn(self, component: str) -> None:
        if self._is_in_use:
            self._num_passes[component] += 1
        if self._turns and self._turns[-1][0] == component:
            passes = self._turns[-1][1] + 1
            self._turns[-1] = component, passes
            if passes > _PASSES_OF_A_LOOP:
                self._is_repeated[component] = True
        else:
            self._turns = [*self._turns[1 - _MOST_TURNS :], (component, 1)]

    def _most(
        self,
        group: tuple[str, ...],
        expected: Sequence[CallKind],
        outside_bytes: int,
        bytes_of: Callable[[CallKind, int], int | None],
    ) -> int | None:
        """The largest of what is expected in a phase; None if there is nothing, or it is not known.

        While the phase runs, only what runs now must be known: the first of a prompt, which was measured once, has
        ended when the tokens come.
        """
        is_current = group == self.current
        found = []
        for kind in expected:
            num_bytes = bytes_of(kind, outside_bytes)
            if num_bytes is None and is_current and kind is not self._entered:
                num_bytes = None if kind.known_bytes is None else kind.known_bytes + outside_bytes
                if num_bytes is None:
                    continue
            found.append(num_bytes)
        known = [amount for amount in found if amount is not None]
        return max(known) if known and len(known) == len(found) else None

    def _kind(self, key: Key) -> CallKind:
        if key.is_look:  # a call of the component is to follow, perhaps of a part that nobody knows of
            measured = [r for k, r in self._kinds.items() if k.component == key.component and r.is_measured]
            return max(measured, key=lambda r: r.over_bytes or 0, default=CallKind(key, num_missing=_MOST_KEYS))
        known = self._kinds.pop(key, None)
        if known is not None:
            self._kinds[key] = known  # the first in line is the one not used for longest
        entry = (key.component, key.entry)
        last_key, self._last_key[entry] = self._last_key.get(entry), key
        if known is not None and (known.key == key or known.is_growing):
            return known
        last = self._kinds.get(last_key) if last_key is not None else None
        if last is not None and last_key is not None and key.is_a_token_after(last_key):
            if last.over_bytes is not None and key.growth_since(last.key) > _LONGER:
                # Measured anew, with what was kept so far and a quarter more meanwhile: evicting everything every
                # few hundred tokens would cost more than the loop does.
                last = CallKind(
                    key,
                    last.kept_bytes(0),
                    is_growing=True,
                    compute_ms=last.compute_ms,
                    num_untimed=last.num_untimed + last.num_unread,
                )
            last.is_growing = True
            return self._remember(key, last)
        larger = [r for k, r in self._kinds.items() if r.is_measured and r.key is k and key.is_covered_by(k)]
        least = min(larger, key=lambda r: r.over_bytes or 0, default=None)
        # A VAE that decodes does the same each time, and would otherwise drive everything out once more. What runs many
        # times a call is measured twice, since that costs nothing.
        num_missing = _MEASUREMENTS if self._is_repeated[key.component] or key.may_pad else 1
        return self._remember(
            key, CallKind(key, least.over_bytes if least is not None else None, num_missing=num_missing)
        )

    def _remember(self, key: Key, kind: CallKind) -> CallKind:
        while len(self._kinds) >= _MOST_KEYS:
            self._kinds.pop(next(iter(self._kinds)))
        self._kinds[key] = kind
        return kind
