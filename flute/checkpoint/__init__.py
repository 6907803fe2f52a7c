"""Checkpoints on disk: what is read is checked first, what is written is whole or not there at all.

``files``         strict JSON, names that stay inside their folder, one error for everything that is wrong
``shards``        safetensors headers of a folder, and a writer that needs one tensor in memory at a time
``atomic``        folders that appear at once or not at all
``architecture``  which tensors a model has, dense and quantized
``plan``          what a streaming run will write, before a weight is read
``streaming``     quantize a folder shard by shard, resumable
``validate``      compare a folder's headers with what its config.json promises
"""
