"""Megrez2 in the engines others use: transformers, vLLM and SGLang. See README.md.

`import megrez_engines` makes transformers' Auto classes know the model. vLLM and SGLang find it
by themselves.
"""

from megrez_engines.registration import register_with_transformers

register_with_transformers()
