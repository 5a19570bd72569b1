"""Compiles kernels without a GPU: `python -m tests.codec.compiling cuda:90 "('unpack', False, 4, True)"`.

Prints a line of facts of each, as JSON.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from layerstream.codec import kernels, launch

_TYPES = {torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8", 8: "i32"}


def facts_of(gpu: str, name: str, *constants: object) -> dict[str, Any]:
    backend, _, arch = gpu.partition(":")
    function = getattr(kernels, name)
    names, types = function.arg_names, [_TYPES[each] for each in launch._ARGUMENTS[name]]
    signature, values = dict(zip(names, types, strict=False)), dict(zip(names[len(types) :], constants, strict=True))
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3):
        source = ASTSource(
            fn=function,
            signature=signature | dict.fromkeys(values, "constexpr"),
            constexprs={(names.index(each),): value for each, value in values.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i, each in enumerate(types) if each.startswith("*")},
        )
    else:
        source = ASTSource(fn=function, signature=signature, constants=values)
    target = GPUTarget(backend, int(arch), 32) if backend == "cuda" else GPUTarget(backend, arch, 64)
    options = {"num_warps": launch._WARPS[name]}
    if name == "unpack" and target.arch in launch._GPUS_OF_64_WARPS:
        options["maxnreg"] = 32
    compiled = triton.compile(source, target=target, options=options)
    facts = {"shared_bytes": compiled.metadata.shared, "source": compiled.asm["ttir"]}
    if backend == "cuda":
        facts["barriers"] = compiled.asm["ptx"].count("bar.sync")
        facts |= _resources(compiled.asm["cubin"])
    return facts


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers of a lane, and bytes that did not find room in them."""
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [folder / "cuobjdump", "-res-usage", file.name], capture_output=True, check=True, text=True
        )
    found = dict(re.findall(r"(REG|LOCAL|STACK):(\d+)", done.stdout))
    return {"registers": int(found["REG"]), "spilled_bytes": int(found["LOCAL"]) + int(found["STACK"])}


if __name__ == "__main__":
    for asked in sys.argv[2:]:
        print(json.dumps(facts_of(sys.argv[1], *ast.literal_eval(asked))))
