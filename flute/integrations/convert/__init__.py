"""Checkpoints of other owners to checkpoints of ours, without changing a weight.

``exact``               what "without changing" means, and the one function that finds codes, scales and table
``uniform``             integers with zero points in words of 32 bits: the common ground of four formats
``bitsandbytes`` ``gptq`` ``awq`` ``hqq`` ``compressed`` ``upstream`` ``gguf``    one owner each: its tensors of one
                        layer in, what they mean out
``source``              which of them a folder or file is, and its tensors by layer
``folder``              the new checkpoint: every layer examined first, then written shard by shard
"""
