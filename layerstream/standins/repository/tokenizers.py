"""Tokenizers of further classes, made as those of `layerstream.standins.tokenizers` are."""

import string
from typing import Any

from layerstream.standins.libraries import transformers

QWEN_END = "<|endoftext|>"
QWEN_SPECIAL = (
    QWEN_END,
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Sizes of the embeddings that read these ids; rounded up, since a real vocabulary has unused rows too.
QWEN_VOCAB_SIZE = 272
LETTER_VOCAB_SIZE = 104
ROBERTA_VOCAB_SIZE = 264  # 256 bytes and 4 special tokens before them
BYTE_VOCAB_SIZE = 384  # of ByT5: 3 special tokens, 256 bytes, 125 more
LETTER_PAD_ID, LETTER_START_ID, LETTER_END_ID = 0, 1, 2
GLM_CODES = 64  # codes of an image: the first ids, and all that the head of the model knows
GLM_SPECIAL = ("<|image_start|>", "<|image_end|>", "<|image|>", "<sop>", "<eop>", "<pad>", "<unk>")
GLM_VOCAB_SIZE = 176

# ChatML as the Qwen models have it, without tools and thinking; content is a string or a list of text parts.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GLM_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|image_start|><|image|><|image_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def letter_tokenizer(class_name: str, *, start: str, end: str, max_length: int = 8192) -> Any:
    """Return a tokenizer of printable ASCII with a token before each text and none behind it.

    Args:
        class_name: Of transformers, for instance GemmaTokenizerFast or LlamaTokenizerFast.
        start: The token before each text, in the style of that class.
        end: The end token, which its models know.
        max_length: What the tokenizer says of its model.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    tokens = ["<pad>", start, end, "<unk>", *string.printable]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single=[start, "$A"], pair=[start, "$A", start, "$B"], special_tokens=[(start, LETTER_START_ID)]
    )
    return getattr(transformers, class_name)(
        tokenizer_object=backend,
        bos_token=start,
        eos_token=end,
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=max_length,
        padding_side="right",
    )


def roberta_tokenizer(*, max_length: int) -> Any:
    """Return a RobertaTokenizerFast (byte level): a start and an end token around each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    tokens = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return transformers.RobertaTokenizerFast(tokenizer_object=backend, model_max_length=max_length)


def qwen_tokenizer(*, max_length: int = 131072) -> Any:
    """Return a Qwen2Tokenizer (byte level) with the chat and vision tokens and a ChatML template."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *QWEN_SPECIAL]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(QWEN_SPECIAL))
    tokenizer = transformers.Qwen2TokenizerFast(tokenizer_object=backend, model_max_length=max_length)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def qwen_vl_processor(tokenizer: Any, *, image_pixels: int = 0) -> Any:
    """Return a Qwen2VLProcessor for text, or with `image_pixels` for text and images of about so many pixels.

    The full one wants a video processor too, and that wants torchvision, which layerstream does not need. Its patches
    are those of `components.qwen25_vl_encoder`.
    """

    class PartialProcessor(transformers.Qwen2VLProcessor):  # type: ignore[misc, name-defined]  # Any to mypy
        """What a Qwen2VLProcessor of fewer parts does other than the full one."""

        def _keep(self, tokenizer: Any, *parts: Any, chat_template: str | None) -> None:
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
            # Past the parent, whose own __init__ passes all three parts on.
            transformers.ProcessorMixin.__init__(self, *parts, tokenizer, chat_template=chat_template)

    # `attributes` is read by transformers 4; version 5 reads the signature of __init__.
    class TextOnlyProcessor(PartialProcessor):
        """A Qwen2VLProcessor whose only part is the tokenizer."""

        attributes = ["tokenizer"]  # noqa: RUF012 - as the parent has it

        def __init__(self, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any) -> None:
            self._keep(tokenizer, chat_template=chat_template)

    class ImageTextProcessor(PartialProcessor):
        """A Qwen2VLProcessor without a video processor."""

        attributes = ["image_processor", "tokenizer"]  # noqa: RUF012 - as the parent has it

        def __init__(
            self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any
        ) -> None:
            self._keep(tokenizer, image_processor, chat_template=chat_template)

    if not image_pixels:
        return TextOnlyProcessor(tokenizer=tokenizer, chat_template=CHAT_TEMPLATE)
    try:
        image_processor_class = transformers.Qwen2VLImageProcessorPil  # since transformers 5
    except ImportError:
        image_processor_class = transformers.Qwen2VLImageProcessor
    image_processor = image_processor_class(patch_size=4, min_pixels=image_pixels, max_pixels=image_pixels)
    return ImageTextProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)


def glm_ids(codes: int = GLM_CODES) -> dict[str, int]:
    """Return the ids of GLM-Image's special tokens: image_start, image_end, image, sop, eop, pad, unk.

    They follow the `codes` of images.
    """
    return {token.strip("<|>"): codes + i for i, token in enumerate(GLM_SPECIAL)}


def glm_processor(*, codes: int = GLM_CODES, patch: int = 8, sketches_small: bool = True) -> Any:
    """Return a GlmImageProcessor with a letter per token.

    A model of the real size first sketches the image in 16 x 16 codes. With `sketches_small` it does in 6 x 6, which
    takes a seventh of the time.

    Args:
        codes: how many there are for images.
        patch: of the vision tower, in pixels. The pipeline wants a code for 32 pixels, so 16 where it is shown images.
        sketches_small: see above.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokens = [*(f"<|code_{i}|>" for i in range(codes)), *GLM_SPECIAL, *string.printable]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(GLM_SPECIAL))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|image_start|>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.image_token, tokenizer.grid_bos_token, tokenizer.grid_eos_token = "<|image|>", "<sop>", "<eop>"

    class SketchingProcessor(transformers.GlmImageProcessor):  # type: ignore[misc, name-defined]  # Any to mypy
        """A GlmImageProcessor for a small first sketch."""

        def _get_target_shape(self, height: int, width: int) -> tuple[int, int, int, int]:
            return height // 32, width // 32, 6, 6

    processor_class = SketchingProcessor if sketches_small else transformers.GlmImageProcessor
    return processor_class(
        image_processor=transformers.GlmImageImageProcessorPil(patch_size=patch, temporal_patch_size=1, merge_size=1),
        tokenizer=tokenizer,
        chat_template=GLM_TEMPLATE,
    )
