"""Measuring the engine: whether a kernel's answers are right (`correctness`) and how long it takes (`timing`)."""
