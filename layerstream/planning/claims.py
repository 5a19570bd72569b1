"""Who gets what the reserves of all phases leave: claims, granted in their order where there is room. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from layerstream.blocks import UnitSpec
from layerstream.planning.draft import Draft


def fill(drafts: Sequence[Draft], known: Sequence[Draft], num_slots: int | None) -> None:
    """Give out what the reserves leave: phases that are repeated choose first, the rest goes by claims.

    They choose with all the room there is, since copies that compute hides are not free (`MANY_PASSES`). Where a call
    has few passes they choose the least room that gives them their fastest pass: what would spare hidden copies is
    worth more to a text encoder, whose loads nothing hides. What is left in the end is theirs.
    """
    everything = {u.index for d in known for u in d.units}.union(*(d.resident for d in drafts))
    units = {u.index: u for d in drafts for u in d.units}
    if all(sum(d.size(units[i]) for i in everything) + d.wires_bytes <= (d.capacity_bytes or 0) for d in known):
        for draft in known:
            draft.num_slots, draft.packed = 0, {}
            draft.add([units[i] for i in sorted(everything)])
            draft.resident = {u.index for u in draft.units}
        return
    for draft in known:
        if draft.phase.is_repeated:
            draft.choose(num_slots, is_frugal=draft.phase.is_brief and len(known) > 1)
        else:
            draft.take_least(num_slots)
    grants = _Grants()
    grants.give_out(_claims(drafts, known, num_slots, grants))
    shared = {unit for draft in known for unit in draft.kept}
    for draft in known:
        if draft.phase.is_brief and draft.num_slots:
            draft.spend(num_slots, shared)
        grants.give_out(_Claim((block,), (draft,), f"seldom {block.index}") for block in draft.seldom)
    _keep_rings(known)
    for draft in known:
        for other in known:
            if other is not draft:
                draft.keep_packed_of(other)


def _keep_rings(known: Sequence[Draft]) -> None:
    """A phase without slots of its own leaves those of the next one that has some where they are: they need not be laid
    out in between, for which the device is waited for, and are filled before that phase begins."""
    for number, draft in enumerate(known):
        following = next((other for other in (*known[number + 1 :], *known[:number]) if other.num_slots), None)
        if following is not None:
            draft.keep_ring(following)


@dataclass(frozen=True)
class _Claim:
    """Units that somebody would have on the device in some phases: in its own they are resident, in others kept.

    Attributes:
        where: the phases; it is granted in all of them or in none.
        chain: claims of one chain are granted until one is refused. So nobody is served before all that come earlier
            are, and more budget never takes from one to give to another.
    """

    units: tuple[UnitSpec, ...]
    where: tuple[Draft, ...]
    chain: str


class _Grants:
    """Gives out room, claim by claim."""

    def __init__(self) -> None:
        self.refused: set[str] = set()  # chains

    def give_out(self, claims: Iterable[_Claim]) -> None:
        """Grant claims, in their order, where there is room. Each is asked for after those before are granted."""
        for claim in claims:
            if claim.chain in self.refused:
                continue
            if all(draft.has_room_for(claim.units) for draft in claim.where):
                for draft in claim.where:
                    draft.add(claim.units)
            else:
                self.refused.add(claim.chain)


def _claims(
    drafts: Sequence[Draft], known: Sequence[Draft], num_slots: int | None, grants: _Grants
) -> Iterator[_Claim]:
    """What every phase would have beside what it needs, the most urgent first."""
    # Between two uses of a unit every other phase runs. What one of them has no room for is loaded again, which costs
    # nothing only where a later one streams nothing, and has room.
    everywhere = tuple(known)
    hidden = [unit for draft in drafts for unit in draft.hidden_at_first]
    late = {u.index for u in hidden}
    for unit in _by_urgency(drafts):
        if unit.index not in late:
            yield _Claim((unit,), everywhere, "once loaded")
    if "once loaded" not in grants.refused:
        yield from _claims_of_blocks_used_once(known, everywhere, grants)
    # What no other phase can use goes to a phase's own blocks while it runs, spread: a loaded block that stays costs
    # nothing more, and a text encoder often runs twice a call, a language model once per token. The small ones stay
    # beside the large ones: each of their bytes is there as often, and the large one streams in any case.
    once = sorted((d for d in known if not d.phase.is_repeated), key=lambda d: sum(d.size(u) for u in d.units))
    served = {unit for draft in known for unit in draft.kept}
    for number, draft in enumerate(once):
        yield from _claims_of_others(draft, once[:number], served)
        chain = f"its own of {draft.phase.name}"
        own = [b for b in draft.blocks if b.index not in draft.resident]
        yield _Claim(tuple(own), (draft,), chain)
        if chain in grants.refused and not draft.shares_blocks:
            draft.choose(num_slots)
        elif chain in grants.refused:
            for block in _spread(own):
                yield _Claim((block,), (draft,), f"some of {chain}")
    for draft in once:
        yield from _claims_of_others(draft, once, served)
    if "once loaded" not in grants.refused:
        for unit in hidden:
            yield _Claim((unit,), everywhere, "hidden in a first pass")


def _claims_of_others(draft: Draft, others: Sequence[Draft], served: Collection[int]) -> Iterator[_Claim]:
    """What is resident in other phases, while this one runs."""
    for unit in [u for d in others for u in d.units if u.index in d.resident and u.index not in served]:
        if unit.index not in draft.kept and unit not in draft.units:
            yield _Claim((unit,), (draft,), f"of others, while {draft.phase.name} runs")


def _by_urgency(drafts: Sequence[Draft]) -> list[UnitSpec]:
    """What is resident while its own phase runs: bases of phases that are repeated, their blocks, and the rest."""
    return [
        u
        for is_repeated in (True, False)
        for is_block in ((False, True) if is_repeated else (None,))
        for d in drafts
        if d.phase.is_repeated is is_repeated
        for u in d.units
        if u.index in d.resident and is_block in (None, u.is_block)
    ]


def _claims_of_blocks_used_once(
    known: Sequence[Draft], everywhere: tuple[Draft, ...], grants: _Grants
) -> Iterator[_Claim]:
    """Blocks of phases that are not repeated, for the next call: small stacks first, and of the first that does not fit
    as many as do, spread."""
    stacks = [(d, c) for d in known if not d.phase.is_repeated for c in d.phase.components]
    groups = [(d, c, [b for b in d.blocks if b.component == c and b.index not in d.resident]) for d, c in stacks]
    for owner, component, blocks in sorted(groups, key=lambda g: sum(b.num_bytes for b in g[2])):
        chain = f"all of {component}"
        yield _Claim(tuple(blocks), everywhere, chain)
        if chain in grants.refused:
            for block in _spread(blocks):
                yield _Claim((block,), everywhere, f"some of {component}")
        owner.shares_blocks |= any(b.index in owner.resident for b in blocks)
        if chain in grants.refused:
            return


def _spread(blocks: Sequence[UnitSpec]) -> list[UnitSpec]:
    """In an order whose beginnings are spread: halves, quarters, eighths."""
    return [blocks[i] for i in sorted(range(len(blocks)), key=lambda number: f"{number:032b}"[::-1])]
