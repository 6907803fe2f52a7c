"""Tilings of the matmul kernel are legal on Hopper, cover everything once, and exist for every problem."""

from math import ceil

import pytest
from gpus import GPUS
from hypothesis import given, settings
from hypothesis import strategies as st

from flute.kernels import plan, tiles
from flute.kernels.layout import CHUNK_K, TILE_ROWS, chunk_bytes

H100 = GPUS["H100"]


def legal(made: tiles.Tiling, m: int, n: int, k: int, bits: int, group: int) -> None:
    assert made.shared_bytes * made.per_sm + 1024 * made.per_sm <= H100.shared_bytes + 1024
    assert made.threads <= 1024 and made.threads * made.per_sm <= 2048
    assert made.rows * made.ways <= 4 and made.ways <= made.stages and 2 * made.ways <= made.boxes
    ring = made.boxes * made.tokens * 128 + made.stages * 4 * made.rows * (
        chunk_bytes(bits) + 32 * CHUNK_K // made.group_block
    )
    assert made.rows * made.ways * made.tokens * 256 <= ring  # partial sums lie where the rings were
    assert made.split * made.ways <= -(-k // CHUNK_K)  # nobody without a chunk: sums of nothing are never written
    assert made.blocks % made.split == 0
    if made.split * made.ways > 1:  # not persistent: a block takes one tile
        assert made.blocks >= made.split * ceil(n / (4 * TILE_ROWS * made.rows)) * ceil(m / made.tokens)
    if 0 < group < k:
        assert group % made.group_block == 0


@given(
    st.integers(1, 5000),
    st.integers(1, 40000),
    st.integers(1, 40000),
    st.sampled_from([2, 3, 4]),
    st.sampled_from([32, 64, 96, 128, 256, -1]),
)
@settings(deadline=None, max_examples=300)
def test_tilings_are_legal(m: int, n: int, k: int, bits: int, group: int) -> None:
    made = tiles.make(H100, m, n, k, bits, k if group == -1 else group)
    assert made is not None and made.cycles > 0
    legal(made, m, n, k, bits, group)


@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (333, 776), (1, 64), (64, 53248)])
@pytest.mark.parametrize("m", [1, 40, 256, 3000])
def test_all_candidates_are_legal_and_kernels_of_theirs_are_compiled_in_the_tests(m: int, n: int, k: int) -> None:
    found = list(tiles.candidates(H100, m, n, k, 4, 64))
    assert found
    for made in found:
        legal(made, m, n, k, 4, 64)
        assert (made.tokens, made.rows, made.ways, made.per_sm) in tiles.variants()


def test_only_hopper_has_the_kernel() -> None:
    for name in ("A100", "RTX 5090"):
        assert tiles.make(GPUS[name], 256, 4096, 4096, 4, 64) is None


def test_slices_of_k_by_multiplication_are_exact() -> None:
    """The kernel divides by the size of a cluster with 2^32 / size, rounded up."""
    for split in plan.CLUSTER_SIZES:
        share = -(-(1 << 32) // split)
        for value in (*range(2000), 8 * (plan.MAX_IN_FEATURES // CHUNK_K), 65535):
            assert value * share >> 32 == value // split


@pytest.mark.parametrize("m", [1, 64, 256, 1000, 9000])
@pytest.mark.parametrize("units", [1, 7, 32])
def test_the_walk_over_tiles_meets_each_once(m: int, units: int) -> None:
    """The same arithmetic as Work::locate in matmul.cu."""
    tokens, band = 128, 16
    token_tiles, seen = -(-m // tokens), []
    for at in range(units * token_tiles):
        first = at // (band * units)
        rest, width = at - first * band * units, min(band, token_tiles - first * band)
        seen.append((rest // width, first * band + rest % width))
    assert sorted(seen) == [(unit, tile) for unit in range(units) for tile in range(token_tiles)]


def turns(block: int, blocks: int, tiles_in_all: int, chunks: int) -> list[tuple[int, int, int]]:
    """(tile, first chunk, chunks) of a block where tiles are cut: the same arithmetic as Work's in work.cuh."""
    whole = max(0, tiles_in_all // blocks - 1) * blocks

    def part(of: int) -> int:
        return (tiles_in_all - whole) * chunks * (blocks - 1 - of) // blocks

    found = [(tile, 0, chunks) for tile in range(block, whole, blocks)]
    at, end = part(block), part(block - 1)
    while at < end:
        count = min(chunks - at % chunks, end - at)
        found.append((whole + at // chunks, at % chunks, count))
        at += count
    return found


@pytest.mark.parametrize("tiles_in_all", [67, 112, 133, 150, 192, 224, 263, 448, 1000])
@pytest.mark.parametrize("chunks", [8, 9, 32, 112])
def test_parts_of_cut_tiles_cover_each_chunk_once(tiles_in_all: int, chunks: int) -> None:
    """And only a block's last turn waits, for blocks with smaller numbers, which leave one part each at most."""
    blocks, seen, left = 132, [], {}
    for block in range(blocks):
        mine = turns(block, blocks, tiles_in_all, chunks)
        seen += [(tile, chunk) for tile, first, count in mine for chunk in range(first, first + count)]
        parts = [(tile, first) for tile, first, count in mine if first > 0]
        assert len(parts) <= 1  # the workspace has room for one
        left[block] = parts
        waits = [number for number, (_, first, count) in enumerate(mine) if first == 0 and count < chunks]
        assert waits in ([], [len(mine) - 1])
        for number in waits:
            tile, _, chunk = mine[number]
            other = block - 1
            while chunk < chunks:  # the kernel goes through the blocks below in turn
                assert left[other] == [(tile, chunk)]
                chunk += next(count for at, first, count in turns(other, blocks, tiles_in_all, chunks) if at == tile)
                other -= 1
            assert chunk == chunks
    assert sorted(seen) == [(tile, chunk) for tile in range(tiles_in_all) for chunk in range(chunks)]


def test_only_what_leaves_the_gpu_uneven_is_cut() -> None:
    def made(m: int, n: int) -> tiles.Tiling | None:
        return tiles.tiling(H100, m, n, 4096, 4, 64, 256, 2, 1, 1, 1, True, cut=True)

    assert made(256, 132 * 128) is None and made(256, 65 * 128) is None
    chosen = made(256, 28672)
    assert chosen is not None and chosen.blocks == 132 and chosen.workspace * 4 == 640 + 132 * 128 * 256 * 4


def test_an_x_beyond_the_l2_cache_is_not_cut() -> None:
    """4096x14336 at 4096 tokens took 1.23 times as long cut as whole, all of whose blocks walk K together."""
    problem = (H100, 4096, 4096, 14336, 4, 64, 256, 2, 1, 1, 1, True)
    assert tiles.tiling(*problem) is not None and tiles.tiling(*problem, cut=True) is None
