"""MammothModa2 (Dev): one model whose children are called one by one, and never it.

A vision-language model writes a sketch of the image as tokens, and is then run over all of them for hidden states, by
which a denoiser is led. Modules that define subclasses of transformers' classes import transformers, so that only
building the model imports them.
"""
