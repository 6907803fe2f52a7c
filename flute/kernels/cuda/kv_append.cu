// New keys and values into an int4 cache (flute/kernels/attention.py): a warp a token and head, keys first, then values.
//
// Host macros: BF16, RANGES, KEY_DIM, VALUE_DIM, KEY_SYMMETRIC, VALUE_SYMMETRIC, WARPS (of a block).

struct Store {
  u8* codes;
  u16* scale;  // float16, whatever the model's dtype is
  short* zero;
};

// Where a position of a sequence lies.
struct Place {
  const int* table;
  u64 sequence, head, heads, slots, pages;

  __device__ __forceinline__ bool exists(int position) const { return position >= 0 && position < (int)(slots * pages); }
  __device__ __forceinline__ u64 slot(int position) const {
    const u64 page = table ? table[sequence * pages + position / (int)slots] : sequence;
    return (page * heads + head) * slots + position % (int)slots;
  }
};

template <int Dim, bool Symmetric>
__device__ __forceinline__ void write_row(const u16* from, const Store& store, const Ratios& ratios, const Place& place,
                                          int position, int lane) {
  constexpr int PAIRS = (Dim / 2 + 31) / 32;
  float pairs[PAIRS][2], low = __uint_as_float(0x7f800000u), high = -low;
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) {
    if (i * 32 + lane >= Dim / 2) break;
    const u32 both = ((const u32*)from)[i * 32 + lane];
    pairs[i][0] = wide((u16)both), pairs[i][1] = wide((u16)(both >> 16));
    low = fminf(low, fminf(pairs[i][0], pairs[i][1])), high = fmaxf(high, fmaxf(pairs[i][0], pairs[i][1]));
  }
  low = -reduce_warp<true>(-low), high = reduce_warp<true>(high);
  const Range range = make_range<4, Symmetric, true>(low, high, ratios);
  if (!place.exists(position)) return;  // not earlier: its length is on its way while the row is
  const u64 slot = place.slot(position);
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) {
    if (i * 32 + lane >= Dim / 2) break;
    u8 codes[2];
    make_codes<4>(codes, pairs[i], range);
    store.codes[slot * (Dim / 2) + i * 32 + lane] = (u8)((codes[0] & 15) | codes[1] << 4);
  }
  if (lane == 0) {
    store.scale[slot] = float_to_half(range.scale);
    if (!Symmetric) store.zero[slot] = (short)fminf(fmaxf(range.zero, -32768.0f), 32767.0f);
  }
}

// key_b, key_h, key_t: strides in elements of sequence, head and token; so for values.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    kv_append(const u16* key, u64 key_b, u64 key_h, u64 key_t, const u16* value, u64 value_b, u64 value_h, u64 value_t,
              u8* key_codes, u16* key_scale, short* key_zero, const float* key_clip, u8* value_codes, u16* value_scale,
              short* value_zero, const float* value_clip, const int* lengths, const int* table, u64 batch, u64 heads,
              u64 tokens, u64 slots, u64 pages) {
  const int lane = threadIdx.x & 31;
  const u64 rows = batch * heads * tokens, at = (u64)blockIdx.x * WARPS + (threadIdx.x >> 5);
  let_next_begin();
  const bool of_keys = at < rows;
  const Ratios ratios(of_keys ? key_clip : value_clip);
  wait_for_last();
  if (at >= 2 * rows) return;
  const u64 row = at % rows, head = row % heads, token = row / heads % tokens, sequence = row / heads / tokens;
  const Place place{table, sequence, head, heads, slots, pages};
  const int position = lengths[sequence] - (int)tokens + (int)token;
  if (of_keys) {
    const Store store{key_codes, key_scale, key_zero};
    write_row<KEY_DIM, KEY_SYMMETRIC>(key + sequence * key_b + head * key_h + token * key_t, store, ratios, place, position, lane);
  } else {
    const Store store{value_codes, value_scale, value_zero};
    write_row<VALUE_DIM, VALUE_SYMMETRIC>(value + sequence * value_b + head * value_h + token * value_t, store, ratios, place, position,
                                          lane);
  }
}
