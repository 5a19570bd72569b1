"""Single instructions of NVIDIA GPUs that Triton has no name for, and the same in plain Triton.

Each function takes `ptx`: True writes the instruction; False, for other GPUs and for Triton's interpreter, does
without. Loads and stores are among them, because Triton gives each of its own a layout and moves the values between
layouts through shared memory. In assembly each lane has what it loaded. Source: the project's study of lossless codecs,
where unpacking took 872 instructions and 54 barriers without, 464 and none with.

Imports Triton; imported only by `kernels.py`.
"""
# Triton's language, which Triton compiles:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def permute(low, high, selector, ptx: tl.constexpr):
    """Four of the eight bytes (high:low), the one that each of the selector's low nibbles names (its low three
    bits)."""
    if ptx:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        both = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
        result = low & 0
        for i in tl.static_range(4):
            shift = (((selector >> (4 * i)) & 7) * 8).to(tl.uint64)
            result = result | (((both >> shift) & 255).to(tl.uint32) << (8 * i))
        return result


@triton.jit
def funnel(low, high, shift, ptx: tl.constexpr):
    """The low word of (high:low) >> shift, where shift is 32 at most."""
    if ptx:
        return tl.inline_asm_elementwise(
            "shf.r.clamp.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, shift], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        both = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
        return ((both >> shift.to(tl.uint64)) & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def shift_pair(low, high, shift, ptx: tl.constexpr):
    """Both words of (high:low) >> shift, where shift is 64 at most."""
    if ptx:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 t; mov.b64 t, {$2, $3}; shr.b64 t, t, $4; mov.b64 {$0, $1}, t; }",
            "=r,=r,r,r,r",
            [low, high, shift],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    else:
        both = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
        both = tl.where(shift < 64, both >> tl.minimum(shift, 63).to(tl.uint64), both & 0)
        return (both & 0xFFFFFFFF).to(tl.uint32), (both >> 32).to(tl.uint32)


@triton.jit
def ones(bits, ptx: tl.constexpr):
    """How many bits are set."""
    if ptx:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [bits], dtype=tl.uint32, is_pure=True, pack=1)
    else:
        x = bits - ((bits >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F
        x = x + (x >> 8)
        return (x + (x >> 16)) & 63


@triton.jit
def ones_below(bits, number, ptx: tl.constexpr):
    """How many of the lowest `number` bits are set, 32 at most."""
    if ptx:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; sub.u32 t, 32, $2; shl.b32 t, $1, t; popc.b32 $0, t; }",
            "=r,r,r",
            [bits, number],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    else:
        all_of_them = ((bits.to(tl.uint64) * 0 + 1) << number.to(tl.uint64)) - 1
        return ones((bits.to(tl.uint64) & all_of_them).to(tl.uint32), ptx)


@triton.jit
def load(pointer, ptx: tl.constexpr):
    """32 bits that nobody writes meanwhile; pointer to int32."""
    if ptx:
        return tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];", "=r,l", [pointer], dtype=tl.uint32, is_pure=False, pack=1
        )
    else:
        return tl.load(pointer).to(tl.uint32, bitcast=True)


@triton.jit
def load_16(pointer, ptx: tl.constexpr):
    """Likewise 16 bits; pointer to uint16."""
    if ptx:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 t; ld.global.nc.b16 t, [$1]; cvt.u32.u16 $0, t; }",
            "=r,l",
            [pointer],
            dtype=tl.uint32,
            is_pure=False,
            pack=1,
        )
    else:
        return tl.load(pointer).to(tl.uint32)


@triton.jit
def load_64(pointer, ptx: tl.constexpr):
    """Likewise 64 bits as two words; pointer to int64."""
    if ptx:
        return tl.inline_asm_elementwise(
            "ld.global.nc.v2.b32 {$0, $1}, [$2];",
            "=r,=r,l",
            [pointer],
            dtype=(tl.uint32, tl.uint32),
            is_pure=False,
            pack=1,
        )
    else:
        both = tl.load(pointer).to(tl.uint64, bitcast=True)
        return (both & 0xFFFFFFFF).to(tl.uint32), (both >> 32).to(tl.uint32)


@triton.jit
def load_64_if(pointer, keep, ptx: tl.constexpr):
    """Likewise where `keep` is set, and zeros elsewhere."""
    if ptx:
        return tl.inline_asm_elementwise(
            "{ .reg .pred q; setp.ne.s32 q, $3, 0; mov.b32 $0, 0; mov.b32 $1, 0; "
            "@q ld.global.nc.v2.b32 {$0, $1}, [$2]; }",
            "=&r,=&r,l,r",
            [pointer, keep.to(tl.int32)],
            dtype=(tl.uint32, tl.uint32),
            is_pure=False,
            pack=1,
        )
    else:
        both = tl.load(pointer, mask=keep, other=0).to(tl.uint64, bitcast=True)
        return (both & 0xFFFFFFFF).to(tl.uint32), (both >> 32).to(tl.uint32)


@triton.jit
def store_128_if(pointer, a, b, c, d, keep, ptx: tl.constexpr):
    """Write four words, where `keep` is set; pointer to int64, divisible by 16."""
    if ptx:
        tl.inline_asm_elementwise(
            "{ .reg .pred q; setp.ne.s32 q, $6, 0; @q st.global.v4.b32 [$1], {$2, $3, $4, $5}; mov.u32 $0, 0; }",
            "=r,l,r,r,r,r,r",
            [pointer, a, b, c, d, keep.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        low = (a.to(tl.uint64) | (b.to(tl.uint64) << 32)).to(tl.int64, bitcast=True)
        high = (c.to(tl.uint64) | (d.to(tl.uint64) << 32)).to(tl.int64, bitcast=True)
        tl.store(pointer, low, mask=keep)
        tl.store(pointer + 1, high, mask=keep)


@triton.jit
def load_if(pointer, keep, ptx: tl.constexpr):
    """32 bits that nobody writes meanwhile where `keep` is set, and zero elsewhere; pointer to int32."""
    if ptx:
        return tl.inline_asm_elementwise(
            "{ .reg .pred q; setp.ne.s32 q, $2, 0; mov.b32 $0, 0; @q ld.global.nc.b32 $0, [$1]; }",
            "=&r,l,r",
            [pointer, keep.to(tl.int32)],
            dtype=tl.uint32,
            is_pure=False,
            pack=1,
        )
    else:
        return tl.load(pointer, mask=keep, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def store_16_if(pointer, value, keep, ptx: tl.constexpr):
    """Write the low 16 bits where `keep` is set; pointer to int16."""
    if ptx:
        tl.inline_asm_elementwise(
            "{ .reg .pred q; .reg .b16 t; setp.ne.s32 q, $3, 0; cvt.u16.u32 t, $2; @q st.global.b16 [$1], t; "
            "mov.u32 $0, 0; }",
            "=r,l,r,r",
            [pointer, value, keep.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(pointer, (value & 0xFFFF).to(tl.uint16).to(tl.int16, bitcast=True), mask=keep)
