"""Doors to other libraries. Nothing outside this package imports transformers, accelerate, PEFT or vLLM."""
