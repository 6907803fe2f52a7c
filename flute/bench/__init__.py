"""Measuring the engine: whether a kernel's answers are right (`correctness`) and how long it takes (`timing`).

`kernel` and `model` are behind ``flute bench``: one layer, and a whole model, beside dense and beside `peers`.
"""
