"""The texts of the benchmark's calls, and tokenizers that know their words."""

import re
from typing import Any

PROMPT = (
    "A weathered wooden fishing boat rests on a quiet beach at dawn, its red paint peeling, nets and glass floats "
    "piled on the deck. Behind it, low mist drifts over a calm grey sea and a distant lighthouse still shines. Soft "
    "warm light from the left, long shadows in the wet sand, gulls in the sky, wide angle photograph, fine detail."
)
NEGATIVE_PROMPT = "blurry, low quality, distorted, watermark, text, oversaturated colours"
# What the pipelines wrap around a prompt, as far as it consists of words.
_TEMPLATES = (
    "Describe the image by detailing the color, quantity, text, shape, size, texture, spatial relationships of the "
    "objects and background: ",
    "system user assistant As an image captioning expert, generate a descriptive text prompt based on an image "
    "content, suitable for input to a text-to-image model.",
)


def know_words(tokenizer: Any, *texts: str) -> Any:
    """Make a token of each word in `texts`, so that they take about as many tokens as with a true vocabulary.

    Without `texts` they are those of our calls.
    """
    from tokenizers import AddedToken

    words = set(re.findall(r"\w+", " ".join(texts or [PROMPT, NEGATIVE_PROMPT, *_TEMPLATES])))
    if type(tokenizer).__name__.startswith("Qwen"):  # whose tokens include the space before a word
        words |= {" " + word for word in words}
    # As they are written: CLIP writes in lower case, and which of two words alike there is meant would be chance.
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in sorted(words)])
    return tokenizer
