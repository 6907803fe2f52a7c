"""Bytes on disk and kernel order: exact inverses, and exactly the layout that is documented."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flute.errors import OperatorError
from flute.kernels import layout
from flute.packing import pack_codes, unpack_codes


def random_codes(rows: int, count: int, bits: int) -> torch.Tensor:
    codes = torch.randint(0, 1 << bits, (rows, count), dtype=torch.uint8)
    codes[-1, -1] = (1 << bits) - 1  # the top code is never left out
    return codes


@given(st.integers(1, 5), st.integers(1, 70), st.integers(1, 8), st.integers(0, 2**31))
@settings(deadline=None)
def test_pack_codes_round_trip(rows: int, count: int, bits: int, seed: int) -> None:
    torch.manual_seed(seed)
    codes = random_codes(rows, count, bits)
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, -(-count * bits // 8))
    assert torch.equal(unpack_codes(packed, bits, count), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_the_stream_is_little_endian_along_k(bits: int) -> None:
    torch.manual_seed(0)
    codes = random_codes(3, 29, bits)
    for row, packed in zip(codes.tolist(), pack_codes(codes, bits).tolist(), strict=True):
        number = sum(code << (j * bits) for j, code in enumerate(row))
        assert packed == list(number.to_bytes(-(-29 * bits // 8), "little"))


def test_rows_can_be_cut_at_eight_codes() -> None:
    codes = random_codes(4, 64, 3)
    whole = pack_codes(codes, 3)
    assert torch.equal(whole[:, 9:], pack_codes(codes[:, 24:].contiguous(), 3))


def test_bad_codes_are_refused() -> None:
    with pytest.raises(OperatorError, match="does not fit"):
        pack_codes(torch.full((1, 8), 8, dtype=torch.uint8), 3)
    with pytest.raises(OperatorError, match="uint8"):
        pack_codes(torch.zeros(1, 8), 3)
    with pytest.raises(OperatorError, match="need uint8"):
        unpack_codes(torch.zeros(1, 4, dtype=torch.uint8), 3, 8)


shapes = [(16, 128), (1, 64), (5, 7), (33, 333), (48, 576), (17, 1), (100, 260)]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", shapes)
def test_kernel_order_round_trip(bits: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    n, k = shape
    weight = pack_codes(random_codes(n, k, bits), bits)
    packed = layout.pack_weight(weight, bits, k)
    assert packed.shape == layout.packed_shape(n, k, bits)
    assert torch.equal(layout.unpack_weight(packed, bits, n, k), weight)
    scales = torch.randn(n, 3)
    assert torch.equal(layout.unpack_scales(layout.pack_scales(scales), n), scales)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_kernel_order_is_what_the_tensor_core_wants(bits: int) -> None:
    """Decode every lane's words as the device does and compare with the fragment's definition."""
    torch.manual_seed(0)
    size = layout.CHUNK_K
    n, k = 32, 2 * size
    codes = random_codes(n, k, bits)
    packed = layout.pack_weight(pack_codes(codes, bits), bits, k)
    words = layout._bytes_to_words(packed, bits)
    for tile in range(2):
        for chunk in range(2):
            for lane in range(32):
                g, t = divmod(lane, 4)
                for q, pieces in enumerate(layout._fields(bits)):
                    value = 0
                    for word, shift, width, low in pieces:
                        value |= (int(words[tile, chunk, lane, word]) >> shift & (1 << width) - 1) << low
                    step, rh, h = q // 4, q // 2 % 2, q % 2
                    row = tile * 16 + 2 * g + h
                    first = chunk * size + 16 * step + 8 * rh + 2 * t
                    assert value == int(codes[row, first]) | int(codes[row, first + 1]) << bits


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_bit_of_a_word_is_used_once(bits: int) -> None:
    used = [0] * (layout.chunk_bytes(bits) // 128)
    for pieces in layout._fields(bits):
        for word, shift, width, _ in pieces:
            mask = ((1 << width) - 1) << shift
            assert used[word] & mask == 0
            used[word] |= mask
    assert all(word == 0xFFFFFFFF for word in used)


def test_scales_of_a_tile_lie_side_by_side() -> None:
    scales = torch.arange(32 * 3).view(32, 3).float()
    packed = layout.pack_scales(scales)
    for tile in range(2):
        for group in range(3):
            assert torch.equal(packed[tile, group], scales[16 * tile : 16 * tile + 16, group])
