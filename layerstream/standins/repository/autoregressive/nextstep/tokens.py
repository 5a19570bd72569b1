"""The tokenizer of NextStep, and the tokens before an image."""

from typing import Any

import torch

from layerstream.standins.repository.tokenizers import QWEN_END, qwen_tokenizer

AREA, BEGIN, END, PLACEHOLDER = "<|image_area|>", "<|begin_of_image|>", "<|end_of_image|>", "<|image_placeholder|>"


def nextstep_tokenizer() -> Any:
    """Return a tokenizer of Qwen's class with the tokens around an image; pads on the left."""
    tokenizer = qwen_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AREA, BEGIN, END, PLACEHOLDER]})
    tokenizer.pad_token = QWEN_END
    tokenizer.padding_side = "left"
    return tokenizer


def image_prefix(height: int, width: int) -> str:
    """Return what comes before the tokens of an image: its size in pixels, then the begin token."""
    return f"{AREA}{height}*{width}{BEGIN}"


def guidance_texts(
    captions: list[str], negative: str, suffix: str, *, image: str | None, cfg: float, cfg_img: float
) -> list[str]:
    """Return the rows of the batch: all captions, then those rows that guidance compares them with.

    Args:
        image: the placeholders of a reference image; None without one.
        suffix: what comes before the tokens of the image.
    """
    negatives = [negative] * len(captions)
    shown = image or ""
    texts = [shown + caption for caption in captions]
    if cfg_img != 1.0:
        texts += [shown + text for text in negatives]
    if cfg != 1.0 or cfg_img != 1.0:
        # Without guidance by the image, both halves see it.
        texts += negatives if cfg_img != 1.0 else [shown + text for text in negatives]
    return [text + suffix for text in texts]


def tokenise(tokenizer: Any, texts: list[str], device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask [rows, length], padded on the left."""
    rows = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    return rows.input_ids.to(device), rows.attention_mask.to(device)
