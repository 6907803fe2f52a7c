"""Plans are legal on every GPU and problem, and cover every row and every chunk exactly once."""

import pytest
from gpus import GPUS
from hypothesis import given, settings
from hypothesis import strategies as st

from flute.kernels import plan
from flute.kernels.layout import CHUNK_K, TILE_ROWS


@given(
    st.sampled_from(sorted(GPUS)),
    st.integers(1, 64),
    st.integers(1, 40000),
    st.integers(1, 40000),
    st.sampled_from([2, 3, 4]),
    st.sampled_from([32, 64, 96, 128, 256, -1]),
)
@settings(deadline=None, max_examples=300)
def test_plans_are_legal(name: str, m: int, n: int, k: int, bits: int, group: int) -> None:
    gpu = GPUS[name]
    made = plan.make(gpu, m, n, k, bits, k if group == -1 else group)
    assert made is not None
    assert (made.shared_bytes + 1024) * made.per_sm <= gpu.shared_bytes + 1024
    assert made.per_sm == 1 or gpu.has_clusters
    assert made.tokens <= 8 * made.token_tiles
    assert made.passes * made.tokens >= m > (made.passes - 1) * made.tokens
    assert made.warps <= plan._MAX_WARPS[made.token_tiles, made.row_tiles, made.per_sm] <= 16
    assert made.ways == 1 or gpu.has_clusters
    assert 32 % (made.ways * made.split) == 0
    assert made.clusters == 1 or made.clusters * made.passes <= dict(gpu.clusters)[made.split]
    assert dict(made.macros(bits, True)) | {"STAGES": 4} in [dict(variant) for variant in plan.variants()]
    if group > 0 and group < k:
        assert group % made.group_block == 0


@pytest.mark.parametrize("name", sorted(GPUS))
@pytest.mark.parametrize("m", [1, 16, 64])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (333, 777), (1, 64), (28672, 8192), (64, 53248)])
def test_the_kernels_index_arithmetic_covers_everything_once(name: str, m: int, n: int, k: int) -> None:
    """The same formulas as in decode.cu: units over rounds, clusters and rows; chunks over participants."""
    made = plan.make(GPUS[name], m, n, k, 4, 64)
    assert made is not None
    units = -(-n // (TILE_ROWS * made.row_tiles))
    seen = []
    for cluster in range(made.clusters):
        for row in range(made.rows):
            seen += range(row * made.clusters + cluster, units, made.rows * made.clusters)
    assert sorted(seen) == list(range(units))
    chunks, participants = -(-k // CHUNK_K), made.split * made.ways
    bounds = [me * chunks // participants for me in range(participants + 1)]
    assert bounds[0] == 0 and bounds[-1] == chunks and bounds == sorted(bounds)
    for rank in range(made.split):  # a block's slice of x is that of its warps, and fits its pitch
        first, last = rank * chunks // made.split, (rank + 1) * chunks // made.split
        assert bounds[rank * made.ways] == first and bounds[(rank + 1) * made.ways] == last
        assert (last - first) * CHUNK_K * 2 <= made.pitch


def test_group_numbers_by_multiplication_are_exact() -> None:
    for group in (32, 64, 96, 128, 160, 256, 4096, 1 << 20):
        blocks = group // 32
        magic = -(-(1 << 31) // blocks)
        assert magic < 1 << 32
        for block in (*range(2000), plan.MAX_IN_FEATURES // 32 - 1):
            assert block * magic >> 31 == block // blocks


def test_no_plan_beyond_the_kernels_arithmetic() -> None:
    assert plan.make(GPUS["H100"], 1, 16, plan.MAX_IN_FEATURES + 1, 4, 64) is None
