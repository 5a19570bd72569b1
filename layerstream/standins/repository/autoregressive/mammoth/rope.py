"""Positions of the denoiser: three axes (kind, row, column), as tables of complex numbers on the CPU."""

from collections.abc import Sequence

import torch


def tables(axes: Sequence[int], lengths: Sequence[int]) -> list[torch.Tensor]:
    """Return a table [length, axis / 2] of rotations for each axis."""
    found = []
    for axis, length in zip(axes, lengths, strict=True):
        steps = torch.arange(0, axis, 2, dtype=torch.float32, device="cpu") / axis
        angles = torch.outer(torch.arange(length, dtype=torch.float32, device="cpu"), 10000.0**-steps)
        found.append(torch.polar(torch.ones_like(angles), angles))
    return found


def text_positions(start: int, count: int) -> torch.Tensor:
    """Return positions [count, 3] of text, the same on each axis."""
    return (start + torch.arange(count))[:, None].repeat(1, 3)


def image_positions(start: int, rows: int, columns: int) -> torch.Tensor:
    """Return positions [rows * columns, 3]."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.full_like(row, start), row, column], dim=-1).flatten(0, 1)


def rotations(freqs_cis: Sequence[torch.Tensor], positions: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return complex rotations [1, tokens, 1, head / 2] on `device`, looked up on the CPU."""
    parts = [table[positions[:, axis]] for axis, table in enumerate(freqs_cis)]
    return torch.cat(parts, dim=-1)[None, :, None].to(device)


def rotate(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Return `x` [rows, tokens, heads, head] with each pair of values rotated."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * by).flatten(-2).to(x.dtype)
