"""FlatQuant: learned affine transforms that make weights and activations flat, so that 4 bits suffice for both.

For an invertible P the layer y = x W^T is the same as (x P) (W P^-T)^T. What is rounded are the two factors, and a good
P makes both easy to round (Sun et al. 2025, FlatQuant, arXiv 2410.09426). P is a Kronecker product of two small
matrices behind a diagonal, so applying it costs n (n1 + n2) products per token instead of n^2.

``spec``      `FlatSpec`: bits of weights, activations, keys and values; presets; JSON both ways
``sizes``     n = n1 n2
``factors``   the small matrices as they are learned: orthogonal, diagonal, orthogonal
``initial``   where they begin: closed form from second moments, or Hadamard
``rounding``  symmetric and asymmetric grids, exact; ``fake`` to them and back, with a straight-through gradient
``modules``   what runs: transforms in front of layers, keys and values, integer layers
``learned``   everything that is learned of a block, and its fold into weights and norms
"""
