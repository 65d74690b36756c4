"""Megrez2 in the engines others use: transformers and vLLM. See README.md.

`import megrez_engines` makes transformers' Auto classes know the model. vLLM finds it by itself.
"""

from megrez_engines.registration import register_with_transformers

register_with_transformers()
