"""What a quantized model is worth: on a text, beside the dense model, in tasks, layer by layer, and how fast it is."""
