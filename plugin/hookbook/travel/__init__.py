"""The code that runs beside the model, wherever that is: in this process, or on a server it was sent to.

What is here imports torch, transformers and nnsight alone, and defines plain functions and plain classes, because that
is what survives the journey: a decorator, a dataclass or an import inside a function does not, or changes its meaning.
"""
