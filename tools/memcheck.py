"""Runs the codec's kernels under NVIDIA's compute-sanitizer, which finds accesses outside of what was allocated.

    make memcheck        needs a GPU, and compute-sanitizer of the CUDA toolkit on the PATH

Every allocation is one of its own, so that a read past a buffer is no read of its neighbour. Data that takes every way
through the kernels: normal weights, runs of escapes, groups that stay raw, tails of a few words, both word sizes.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from typing import Any

_LENGTHS = (8, 1032, 8192 + 8, 8192 * 3 + 4104)


def main(arguments: list[str]) -> int:
    if arguments == ["inside"]:
        return _pack_and_unpack()
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not on the PATH: it comes with the CUDA toolkit", file=sys.stderr)
        return 2
    if _pack_and_unpack():  # kernels are compiled here: under the sanitizer that takes minutes
        return 1
    command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "3"]
    command += [sys.executable, "-m", "tools.memcheck", "inside"]
    return subprocess.run(command, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, check=False).returncode


def _pack_and_unpack() -> int:
    """Pack and unpack all kinds of data, and compare; returns how many differ."""
    import torch

    from layerstream import codec
    from layerstream.codec import launch

    data: Any = importlib.import_module("tests.codec.data")
    device = torch.device("cuda", 0)
    codec.warm_up(device)
    num_wrong = num_runs = 0
    for name in data.NAMES:
        for length in _LENGTHS:
            words = data.make(name, length, device)
            for word_bytes, given in ((2, words), (4, data.widened(words).view(torch.int16))):
                packed = launch.encode(given, word_bytes, 2**40)
                if packed is None:
                    continue
                wire, layout = packed
                target = torch.empty(layout.raw_bytes, dtype=torch.uint8, device=device)
                codec.decode(wire, layout, target)
                num_runs += 1
                num_wrong += not torch.equal(target.view(torch.int16), given)
    torch.cuda.synchronize()
    print(f"{num_runs} runs packed and unpacked, {num_wrong} differ; {torch.cuda.get_device_name(device)}")
    return num_wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
