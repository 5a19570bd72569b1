"""Between latents and tokens: a token is a patch of latents."""

import torch


def patchify(latents: torch.Tensor, patch: int) -> torch.Tensor:
    """Return the tokens [n, h * w, channels * patch * patch] of latents [n, channels, h * patch, w * patch]."""
    count, channels, height, width = latents.shape
    rows, columns = height // patch, width // patch
    parts = latents.reshape(count, channels, rows, patch, columns, patch)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(count, rows * columns, channels * patch * patch)


def unpatchify(tokens: torch.Tensor, patch: int, rows: int, columns: int) -> torch.Tensor:
    """Return the latents of `rows` * `columns` tokens: what `patchify` took apart."""
    count, _, width = tokens.shape
    channels = width // patch**2
    parts = tokens.reshape(count, rows, columns, channels, patch, patch)
    return parts.permute(0, 3, 1, 4, 2, 5).reshape(count, channels, rows * patch, columns * patch)
