"""What the kernels do in Triton's interpreter: `TRITON_INTERPRET=1 python -m tests.codec.interpreted NAMES`.

One line of JSON for each data set, and each width of words that it is tried in. Through `launch.py`, on CPU tensors.
"""

from __future__ import annotations

import json
import sys

import torch

from layerstream.codec import launch, reference
from layerstream.codec.format import GROUP_WORDS
from tests.codec.data import make, widened

POISON = 0x5A


def tried(words: torch.Tensor, word_bytes: int) -> dict[str, object]:
    """Whether both encoders give the same bytes, and unpacking gives the words and writes nothing else."""
    expected = reference.encode(words, word_bytes, 2**40)
    packed = launch.encode(words, word_bytes, 2**40)
    assert expected is not None
    buffer = torch.full((expected[1].raw_bytes + 4096,), POISON, dtype=torch.uint8)
    target = buffer[: expected[1].raw_bytes]
    start = launch.prepare(*expected, target)
    start(0)
    first = target.clone()
    target.fill_(POISON)
    start(0)
    return {
        "same_bytes": packed is not None and packed[1] == expected[1] and torch.equal(packed[0], expected[0]),
        "same_words": torch.equal(first.view(torch.int16), words) and torch.equal(target, first),
        "nothing_else": bool((buffer[expected[1].raw_bytes :] == POISON).all()),
        "exceptions": expected[1].num_exceptions,
    }


def main(names: list[str]) -> None:
    for name in names:
        name, _, form = name.partition("/")
        n = {"short": 1032, "long": 2 * GROUP_WORDS + 2056}.get(form, 5128)
        words = make(name, n)
        wide = widened(words).view(torch.int16)
        if form == "lossy":
            wide[-2] = 1
            found: dict[str, object] = {"is_refused": launch.encode(wide, 4, 2**40) is None}
        elif form == "few bytes":
            packed = reference.encode(words, 2, 2**40)
            assert packed is not None
            found = {"is_refused": launch.encode(words, 2, packed[1].num_bytes - 1) is None}
        else:
            found = tried(wide, 4) if form == "wide" else tried(words, 2)
        print(json.dumps({"name": f"{name}/{form}" if form else name, **found}), flush=True)
    launch.warm_up(torch.device("cpu"))


if __name__ == "__main__":
    main(sys.argv[1:])
