"""The plan of one phase while it is made: what it needs, and which residents and slots make its pass fastest. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from layerstream.blocks import UnitSpec, WholeSpec
from layerstream.budget import format_bytes
from layerstream.planning.costs import LINK_GB_PER_S, Costs, compute_ms, decode_ms, load_bytes
from layerstream.planning.pace import LEAST_WIRES, Pace
from layerstream.planning.packed_stay import Streamable, counts_to_play, spread
from layerstream.planning.phase_plan import Phase, PhasePlan
from layerstream.planning.search import Search

LEAST_SLOTS = 2  # one that compute reads, one that is loaded meanwhile
_MOST_SLOTS = 4  # more slots even out blocks of unlike compute; beyond that residents do more
_MOST_COUNTS = 8  # numbers of slots to choose from
_SLOTS_PER_PIECE = 2  # that many more for each piece beyond the first of the block that has most
# The link wanders by a few percent: of placements that just hide their copies, one that hides them with this to spare.
_CAREFUL_SHARE = 0.95


@dataclass(frozen=True)
class _SlotSize:
    """One size of slot: larger blocks must be resident, the others may stream.

    The slots are smaller for it, which pays where a few blocks are far larger than the rest. It tells what a phase
    needs, so it counts units, and the slots that their pieces need; that of `pace.py` spaces residents by position.

    Attributes:
        num_pieces: the most of one block that may stream: all of them are there while it runs.
    """

    slot_bytes: int
    forced: tuple[UnitSpec, ...]
    others: tuple[UnitSpec, ...]
    forced_bytes: int
    num_pieces: int

    def bytes_with(self, wanted: int) -> int:
        """Device memory of the larger blocks and so many slots."""
        return self.forced_bytes + self.num_slots(wanted) * self.slot_bytes

    def num_slots(self, wanted: int) -> int:
        """More slots than blocks that stream would stay empty; one must be free while a block runs."""
        return min(len(self.others), max(wanted, self.num_pieces + 1))


class Draft:
    """The plan of one phase while it is made."""

    def __init__(self, units: Sequence[UnitSpec], phase: Phase, costs: Costs | None, granularity: int) -> None:
        self.phase = phase
        self.granularity = granularity
        self.units = [u for u in units if phase.involves(u)]
        self.own = {u.index for u in self.units}
        self.bases = [u for u in self.units if not u.is_block]
        self.blocks = [u for u in self.units if u.is_block]
        self.uses = costs.uses if costs is not None and phase.is_repeated else {}
        # What hardly any pass uses has no part in it: it is loaded beyond the plan, for which residents make room, or
        # stays where room is left in the end.
        self.on_demand = {b.index for b in self.blocks if self.uses.get(b.index) == 0}
        self.looped = [b for b in self.blocks if b.index not in self.on_demand]
        self.seldom = [b for b in self.blocks if costs is not None and b.index in self.on_demand & costs.seldom]
        # What is packed may be loaded in any phase: its own, or ahead of it.
        self.wire_bytes = max((u.packed.wire for u in units if u.packed is not None), default=0)
        self.base_bytes = sum(self.size(u) for u in self.bases) + self.wires_bytes
        self.slot_sizes = [self._slot_size(size) for size in sorted({self.size(b) for b in self.blocks} | {0})]
        self.least_slot_size = min(self.slot_sizes, key=lambda s: s.bytes_with(LEAST_SLOTS))
        self.least_bytes = self.base_bytes + self.least_slot_size.bytes_with(LEAST_SLOTS)
        self.needed_bytes = self.least_bytes + (phase.reserve_bytes or 0)
        self.is_measured = (
            bool(self.looped) and costs is not None and all(b.index in costs.compute_ms for b in self.looped)
        )
        self.pace = pace_of(self.units, costs, self.uses)
        # The search compares hundreds of placements, and a call waits for it.
        self.search_pace = self.pace.without_decoder()
        self.careful_pace = self.pace.without_decoder(_CAREFUL_SHARE)
        self._position = {u.index: i for i, u in enumerate(self.units)}
        self.decode_ms = self.pace.decode_ms or [0.0] * len(self.units)
        self.capacity_bytes: int | None = None  # for weights; None: not known
        self.resident: set[int] = set()
        self.kept: dict[int, int] = {}  # bytes by unit
        self.packed: dict[int, int] = {}  # what is on the device packed, its own and others': bytes by unit
        self.kept_ring = (0, 0)  # number and size of another phase's slots
        self.shares_blocks = False  # other phases keep some of its blocks
        self.num_slots = 0
        self.takes_least = True  # nothing is known of what it takes: all blocks pass through the slots

    def size(self, unit: UnitSpec) -> int:
        return self._rounded(unit.num_bytes)

    def _rounded(self, num_bytes: int) -> int:
        return -(-num_bytes // self.granularity) * self.granularity

    @property
    def streamed(self) -> list[UnitSpec]:
        """Blocks that pass through the slots."""
        through = self.blocks if self.takes_least else self.looped
        return [b for b in through if b.index not in self.resident]

    @property
    def slot_bytes(self) -> int:
        return max((u.num_bytes for u in self.streamed), default=0)

    @property
    def weights_bytes(self) -> int:
        slots = self.num_slots * self._rounded(self.slot_bytes) + self.kept_ring[0] * self._rounded(self.kept_ring[1])
        residents = sum(self.size(u) for u in self.units if u.index in self.resident)
        return residents + sum(self.kept.values()) + sum(self.packed.values()) + slots + self.wires_bytes

    @property
    def wires_bytes(self) -> int:
        return LEAST_WIRES * self._rounded(self.wire_bytes)

    @property
    def room_bytes(self) -> int:
        assert self.capacity_bytes is not None
        return self.capacity_bytes - self.weights_bytes

    # ---- the phase by itself

    def take_least(self, num_slots: int | None) -> None:
        """What can stream streams; with as many slots as asked for, where they fit."""
        slot_size = self.least_slot_size
        if num_slots is not None:
            wanted = num_slots
            asked = min(self.slot_sizes, key=lambda s: s.bytes_with(wanted))
            if self.capacity_bytes is None or self.base_bytes + asked.bytes_with(num_slots) <= self.capacity_bytes:
                slot_size = asked
            else:
                num_slots = None
        self.resident = {u.index for u in (*self.bases, *slot_size.forced)}
        self.num_slots = slot_size.num_slots(num_slots or LEAST_SLOTS)
        self.packed = {}
        self.takes_least = True

    def choose(self, num_slots: int | None, *, is_frugal: bool = False, stay: Collection[int] = ()) -> None:
        """The fastest pass that fits, with as few copies as all the room allows; frugally: in no more room than hiding
        all copies takes, where that is possible.

        Args:
            stay: blocks that are resident whatever is chosen.
        """
        sizes, room = self._to_place(stay)
        asked = [range(n, n + 1) for n in range(num_slots, LEAST_SLOTS, -1)] if num_slots is not None else []
        most = (_MOST_SLOTS if num_slots is None else LEAST_SLOTS) + _SLOTS_PER_PIECE * (self.pace.most_pieces - 1)
        usual = {*range(LEAST_SLOTS, most + 1, -(-most // _MOST_COUNTS)), self.least_slot_size.num_slots(LEAST_SLOTS)}
        for counts in (*asked, sorted(n for n in usual if n >= LEAST_SLOTS)):
            choice = Search(self.search_pace, sizes, counts).fastest(room)
            if choice is not None:
                if choice.ms_per_pass <= self.search_pace.total_ms + 1e-6:
                    search = Search(self.careful_pace, sizes, counts)
                    careful = search.smallest(room) if is_frugal else search.fastest(room)
                    if careful is not None and careful.ms_per_pass <= self.search_pace.total_ms + 1e-6:
                        choice = careful
                break
        assert choice is not None  # the least fits, or the budget would have been refused
        self.num_slots = choice.num_slots
        self.resident = {u.index for i, u in enumerate(self.units) if not choice.is_streamed(i)} - self.on_demand
        self.packed = {}
        self.takes_least = False
        if self.phase.is_repeated:
            self._keep_packed(sizes, room, num_slots)

    def ms_with_packed(self, phase_plan: PhasePlan) -> float:
        """Of a pass in the room that a plan made before these units were packed gives its own, with as many of them on
        the device packed as pay."""
        self.capacity_bytes = phase_plan.weights_bytes
        self.resident, self.num_slots, self.takes_least = set(phase_plan.resident), phase_plan.num_slots, False
        self._keep_packed(*self._to_place(()), None)
        return self._pass_ms(self.resident, self.packed, self.num_slots)

    def _to_place(self, stay: Collection[int]) -> tuple[list[int], int]:
        """Of each unit, what it takes as a resident or in a slot, 0 of those whose place is settled; and the room there
        is for these.

        Args:
            stay: blocks that are resident whatever is chosen.
        """
        assert self.capacity_bytes is not None
        room = self.capacity_bytes - self.base_bytes - sum(self.kept.values())
        stay = self._with_often_used(stay, room)
        room -= sum(self.size(u) for u in self.blocks if u.index in stay)
        looped = {b.index for b in self.looped if b.index not in stay}
        return [self.size(u) if u.index in looped else 0 for u in self.units], room

    def _keep_packed(self, sizes: Sequence[int], room: int, num_slots: int | None) -> None:
        """Have packed units on the device as they are, in the room of residents, where that makes the pass faster.

        Both are evenly spread, and played: up to 40 ms in all for 84 units. Two searches in place of it took 50 to 430,
        and gave passes that were 0.2 % faster in the mean (Ovis-Image, nine budgets).
        """
        blocks = [u for u, size in zip(self.units, sizes, strict=True) if size]
        best_ms = self._pass_ms(self.resident, {}, self.num_slots)
        decoding_ms = sum(self.decode_ms[i] for i in self._streamed_positions)
        if best_ms <= self.pace.total_ms + decoding_ms + 1e-6 or not any(u.is_packed for u in blocks):
            return  # it waits for nothing, and would have more to decode
        best = self.resident, self.packed, self.num_slots
        least_slots = self._least_slots(blocks) if num_slots is None else self.num_slots
        for slot_bytes in sorted({self._rounded(self.slot_bytes), max(map(self.size, blocks))}):
            # Larger ones have to stay, or the slots would be larger.
            through = [u for u in blocks if self.size(u) <= slot_bytes]
            left = room - sum(self.size(u) for u in blocks if self.size(u) > slot_bytes)
            for slots in sorted({least_slots, self.num_slots}):
                for found in self._with_packed(through, left - slots * slot_bytes, slots, best_ms):
                    ms = self._pass_ms(*found)
                    if ms < best_ms:
                        best_ms, best = ms, found
        self.resident, self.packed, self.num_slots = best

    def _with_packed(
        self, blocks: Sequence[UnitSpec], room: int, num_slots: int, below_ms: float
    ) -> Iterator[tuple[set[int], dict[int, int], int]]:
        """Residents, what is on the device packed, and slots, where a pass may take less than so long.

        Args:
            blocks: what passes through the slots, but for what is resident.
            room: beside the slots.
        """
        may_stay = [u for u in blocks if u.is_packed]
        positions = [self._position[u.index] for u in blocks]
        streamable = [
            Streamable(self.size(u), self._packed_size(u), self.pace.copy_ms[i], self.decode_ms[i], u.is_packed)
            for i, u in zip(positions, blocks, strict=True)
        ]
        for least_ms, count in counts_to_play(streamable, room, self.pace.total_ms):
            if least_ms < below_ms:
                stay = spread(may_stay, count)
                packed = {u.index: self._packed_size(u) for u in stay}
                others = [u for u in blocks if u.index not in packed]
                streamed = self._streamed_evenly(others, room - sum(packed.values()))
                resident = self.own - self.on_demand - packed.keys() - {u.index for u in streamed}
                yield resident, packed, min(num_slots, len(streamed) + count)

    def _least_slots(self, blocks: Iterable[UnitSpec]) -> int:
        """All pieces of a block are there while it runs, and one more."""
        return max(LEAST_SLOTS, max(Counter(b.block_name for b in blocks).values(), default=0) + 1)

    def _streamed_evenly(self, blocks: Sequence[UnitSpec], room: int) -> list[UnitSpec]:
        """What streams of these, if as many as fit in this room are resident, evenly spread: raw ones first, of which a
        byte spares the bus one."""
        streamed: list[UnitSpec] = []
        for is_packed in (False, True):
            alike = [u for u in blocks if u.is_packed is is_packed]
            count = min(len(alike), max(room, 0) // max(1, min(map(self.size, alike), default=1)))
            while sum(map(self.size, stay := spread(alike, count))) > max(room, 0):
                count -= 1
            room -= sum(map(self.size, stay))
            indices = {u.index for u in stay}
            streamed += [u for u in alike if u.index not in indices]
        return streamed

    @property
    def hidden_at_first(self) -> list[UnitSpec]:
        """Blocks that stay, and whose loads a first pass hides behind compute as it hides those of what streams: as
        many as there is time for, the last of the pass. Keeping them until the next call saves nothing."""
        if not self.phase.is_repeated or not self.is_measured:
            return []
        left_ms = self.pace.total_ms - sum(self.pace.copy_ms[i] for i in self._streamed_positions)
        found: list[UnitSpec] = []
        for unit, copy_ms in zip(reversed(self.units), reversed(self.pace.copy_ms), strict=True):
            if unit.is_block and unit.index in self.resident:
                left_ms -= copy_ms
                if left_ms < 0:
                    break
                found.append(unit)
        return found

    def spend(self, num_slots: int | None, shared: Collection[int]) -> None:
        """Give what is left to blocks of its own, if that makes no pass slower; what other phases keep stays."""
        before = self.resident, self.packed, self.num_slots
        self.choose(num_slots, stay=self.resident & set(shared))
        if self._pass_ms(*before) < self._pass_ms(self.resident, self.packed, self.num_slots):
            self.resident, self.packed, self.num_slots = before

    def _pass_ms(self, resident: Collection[int], packed: Collection[int], num_slots: int) -> float:
        streamed = [i for i, u in enumerate(self.units) if u.index not in resident and u.index not in self.on_demand]
        return round(self._pace_with(packed).pass_ms(streamed, num_slots), 6)

    def _pace_with(self, packed: Collection[int]) -> Pace:
        """Of passes with these units on the device packed, by index."""
        return self.pace.keeping_packed({self._position[index] for index in packed if index in self.own})

    def _packed_size(self, unit: UnitSpec) -> int:
        return self._rounded(unit.sizes.wire)

    def plan(self) -> PhasePlan:
        return PhasePlan(
            phase=self.phase,
            resident=frozenset(self.resident),
            kept=frozenset(self.kept),
            num_slots=self.num_slots,
            slot_bytes=self.slot_bytes,
            weights_bytes=self.weights_bytes,
            least_bytes=self.least_bytes,
            prediction=self._pace_with(self.packed).prediction(
                self._streamed_positions, self.num_slots, self.phase.is_repeated
            )
            if self.is_measured
            else None,
            kept_ring=self.kept_ring,
            wires=(LEAST_WIRES, self.wire_bytes) if self.wire_bytes else (0, 0),
            packed=frozenset(self.packed),
        )

    # ---- beside the others

    def keep_ring(self, other: Draft) -> None:
        """Have the slots of another phase stay, if none are needed here and there is room."""
        if self.num_slots:
            return
        self.kept_ring = other.num_slots, other.slot_bytes
        if self.room_bytes < 0:
            self.kept_ring = 0, 0

    def keep_packed_of(self, other: Draft) -> None:
        """Have what another phase has on the device packed stay, if there is room for all of it."""
        packed = {index: size for index, size in other.packed.items() if index in other.own and index not in self.own}
        if sum(packed.values()) <= self.room_bytes:
            self.packed.update(packed)

    def has_room_for(self, units: Sequence[UnitSpec]) -> bool:
        """Whether these may be there beside what is: its own as residents, with the smaller or fewer slots that this
        allows, others kept."""
        before = set(self.resident), dict(self.kept), dict(self.packed), self.num_slots
        self.add(units)
        fits = self.room_bytes >= 0
        self.resident, self.kept, self.packed, self.num_slots = before
        return fits

    def add(self, units: Sequence[UnitSpec]) -> None:
        """Have these, too."""
        own = [unit for unit in units if unit.index in self.own]
        self.resident.update(unit.index for unit in own)
        for unit in own:
            self.packed.pop(unit.index, None)
        self.kept.update((unit.index, self.size(unit)) for unit in units if unit.index not in self.own)
        if own:
            self.num_slots = min(self.num_slots, len(self.streamed))

    # ---- inside

    @property
    def _streamed_positions(self) -> list[int]:
        """Where the blocks that pass through the slots are among the units."""
        through = {b.index for b in self.streamed}
        return [i for i, u in enumerate(self.units) if u.index in through]

    def _with_often_used(self, stay: Collection[int], room: int) -> set[int]:
        """What is used several times a pass stays first, the most used before all, as far as the least of the others
        leaves room: each byte of it spares as many copies."""
        chosen = set(stay)
        often = [b for b in self.looped if self.uses.get(b.index, 1) > 1 and b.index not in chosen]
        for block in sorted(often, key=lambda b: (-self.uses[b.index], self.size(b))):
            others = [b for b in self.looped if b.index not in chosen and b is not block]
            pieces = max(Counter(b.block_name for b in others).values(), default=0)
            slots = min(len(others), max(LEAST_SLOTS, pieces + 1)) * max((self.size(b) for b in others), default=0)
            taken = sum(self.size(b) for b in self.blocks if b.index in chosen) + self.size(block)
            if taken + slots > room:
                break
            chosen.add(block.index)
        return chosen

    def _slot_size(self, slot_bytes: int) -> _SlotSize:
        # What has no bytes needs no slot.
        others = tuple(b for b in self.blocks if 0 < self.size(b) <= slot_bytes)
        forced = tuple(b for b in self.blocks if not 0 < self.size(b) <= slot_bytes)
        pieces = Counter(b.block_name for b in others)
        num_pieces = max(pieces.values(), default=1)
        return _SlotSize(slot_bytes, forced, others, sum(self.size(b) for b in forced), num_pieces)


def pace_of(units: Sequence[UnitSpec], costs: Costs | None, uses: Mapping[int, int]) -> Pace:
    """Passes that use these units in this order.

    Args:
        uses: how often a pass uses a unit, by index, where that is not once.
    """
    often = [uses.get(u.index, 1) for u in units]
    each_ms = compute_ms(units, costs)
    return Pace(
        [(n * load_bytes(u, costs), n * ms) for n, u, ms in zip(often, units, each_ms, strict=True)],
        costs.link_gb_per_s if costs is not None else LINK_GB_PER_S,
        [u.block_name for u in units],
        [n * decode_ms(u, costs) for n, u in zip(often, units, strict=True)],
    )


def too_small(draft: Draft, budget_bytes: int, whole: Sequence[WholeSpec]) -> str:
    """What a budget that does not hold the least of a phase is refused with: what takes how much, and what would do."""
    whole_bytes, reserve = sum(spec.num_bytes for spec in whole), draft.phase.reserve_bytes
    needed = draft.needed_bytes + whole_bytes
    slot_size, name = draft.least_slot_size, " and ".join(f"`{c}`" for c in draft.phase.components)
    parts = []
    if slot_size.others:
        largest = max(slot_size.others, key=lambda b: b.num_bytes)
        each = format_bytes(draft.size(largest))
        parts.append(f"{slot_size.num_slots(LEAST_SLOTS)} slot(s) for `{largest.name}` ({each} each)")
    if slot_size.forced:
        larger = "larger " if slot_size.others else ""
        most = max(slot_size.forced, key=lambda b: b.num_bytes)
        named = f", `{most.name}` alone {format_bytes(draft.size(most))}" if draft.size(most) > budget_bytes else ""
        parts.append(f"{len(slot_size.forced)} {larger}block(s) ({format_bytes(slot_size.forced_bytes)}{named})")
    if draft.wire_bytes:
        each = format_bytes(draft.wire_bytes)
        parts.append(f"{LEAST_WIRES} wire buffers, which packing takes ({each} each)")
    if draft.bases:
        largest = max(draft.bases, key=lambda b: b.num_bytes)
        named = (
            f", `{largest.name}` alone {format_bytes(draft.size(largest))}"
            if draft.size(largest) > budget_bytes
            else ""
        )
        parts.append(f"the weights outside stacks ({format_bytes(sum(map(draft.size, draft.bases)))}{named})")
    if whole:
        kinds = ", ".join(sorted({kind for spec in whole for kind in spec.kinds}))
        parts.append(f"the weights that stay on the device whole ({format_bytes(whole_bytes)} of {kinds})")
    if reserve and draft.phase.is_assumed:
        parts.append(f"activations ({format_bytes(reserve)}, assumed)")
    elif reserve and draft.phase.is_of_others:
        parts.append(f"what others hold ({format_bytes(reserve)})")
    elif reserve:
        parts.append(f"activations and other tensors ({format_bytes(reserve)}, measured)")
    before = "" if reserve and not draft.phase.is_of_others else " before activations"
    listed = ", ".join(parts[:-1]) + (" and " if parts[:-1] else "") + parts[-1] if parts else "it"
    return (
        f"vram_budget {format_bytes(budget_bytes)} is too small: while {name} runs, {listed} need "
        f"{format_bytes(needed)}{before}. Raise vram_budget to at least {needed} bytes ({format_bytes(needed)})."
    )
