"""NextStep-1.1: a language model that writes an image token by token, each drawn by a small flow-matching head.

Two codes run its checkpoint, and there is a stand-in of each: `_a` has layers of its own and a static cache, `_b` is a
subclass of Qwen2Model. Modules that define subclasses of transformers' classes import transformers, so that only
building a model imports them.
"""
