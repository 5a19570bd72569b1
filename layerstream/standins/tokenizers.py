"""Tokenizers of real transformers classes with tiny vocabularies made in memory.

The vocabularies hold single bytes or characters and the special tokens, no merges: every string tokenises, a token per
character, and different prompts give different ids. The backend is handed over as `tokenizer_object`, the one way that
the classes of transformers 4 and 5 share.
"""

import string
from typing import Any

from layerstream.standins.libraries import transformers

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
T5_PAD, T5_END, T5_UNKNOWN, T5_SPACE = "<pad>", "</s>", "<unk>", "▁"
# Sizes of the embeddings that read these ids; rounded up, since a real vocabulary has unused rows too.
CLIP_VOCAB_SIZE, CLIP_START_ID, CLIP_END_ID = 520, 512, 513
T5_VOCAB_SIZE = 104


def clip_tokenizer(*, max_length: int = 77) -> Any:
    """Return a CLIPTokenizer: lower case, byte level, start and end token around each text."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # The end token has the highest id: some versions of CLIPTextModel pool at the largest id of a row.
    tokens = [*letters, *(letter + "</w>" for letter in letters), CLIP_START, CLIP_END]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], end_of_word_suffix="</w>", unk_token=CLIP_END))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"<\|startoftext\|>|<\|endoftext\|>|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    ends = ((CLIP_END, vocab[CLIP_END]), (CLIP_START, vocab[CLIP_START]))
    backend.post_processor = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    return transformers.CLIPTokenizerFast(tokenizer_object=backend, model_max_length=max_length)


def t5_tokenizer(*, max_length: int = 512) -> Any:
    """Return a T5TokenizerFast of printable ASCII; other characters become the unknown token. Serves UMT5 as well."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    characters = [c for c in string.printable if not c.isspace()]
    pieces = [T5_PAD, T5_END, T5_UNKNOWN, T5_SPACE, *characters]
    backend = Tokenizer(models.Unigram([(piece, 0.0 if i < 3 else -2.0) for i, piece in enumerate(pieces)], unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement=T5_SPACE, prepend_scheme="always", split=True),
        ]
    )
    backend.decoder = decoders.Metaspace(replacement=T5_SPACE, prepend_scheme="always", split=True)
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", T5_END], pair=["$A", T5_END, "$B", T5_END], special_tokens=[(T5_END, 1)]
    )
    # No sentinels: the hundred <extra_id_*> would be the larger part of the embedding.
    return transformers.T5TokenizerFast(tokenizer_object=backend, extra_ids=0, model_max_length=max_length)
