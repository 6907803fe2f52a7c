"""What a quantized model is worth: perplexity on a text, and tokens per second."""
