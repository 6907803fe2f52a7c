// Rows of an int4 store (flute/kernels/store.py) as the lanes of a warp take them, for kv_attention.cu.
//
// A step of a warp is STEP neighbouring positions. Lane group g owns RUN neighbours of them, whose scales and zeros it
// reads as vectors; of keys its four lanes share those rows, OWN words each. Of values lane t of every group has the rows
// of groups 2 t and 2 t + 1, TURNS words each. A run never crosses a page: pages are multiples of 16 slots.
//
// A nibble u = code + 8 (so 8 is added to zeros, too) is masked out of its word and, as it is, a float16 below the normal
// ones: u 2^-24, or u 2^-20 if it lies four bits higher. No instruction converts it.
//
// Host macros: KEY_DIM, VALUE_DIM (multiples of 8), KEY_SYMMETRIC, VALUE_SYMMETRIC, TILES (of 16 positions, in a step).

constexpr int RUN = 2 * TILES, STEP = 16 * TILES;
constexpr int WORDS = KEY_DIM / 8, OWN = (WORDS + 3) / 4;                  // of a key; a lane's
constexpr int VALUE_WORDS = VALUE_DIM / 8, TURNS = (VALUE_WORDS + 7) / 8;  // of a value; a lane's

// Nibbles 0 and 4 of a word, times 2^-24; nibbles 1 and 5, times 2^-20.
__device__ __forceinline__ u32 low_pair(u32 word) {
  u32 result;
  asm("lop3.b32 %0, %1, 0x000f000f, 0x00080008, 0x6a;" : "=r"(result) : "r"(word));
  return result;
}

__device__ __forceinline__ u32 high_pair(u32 word) {
  u32 result;
  asm("lop3.b32 %0, %1, 0x00f000f0, 0x00800080, 0x6a;" : "=r"(result) : "r"(word));
  return result;
}

// Words number COUNT lane ... of a row of ALL words; those behind the last are zeros.
template <int COUNT, int ALL>
__device__ __forceinline__ void load_words(u32 (&to)[COUNT], const u8* row, int lane) {
  const u32* from = (const u32*)row + lane * COUNT;
  constexpr int WIDE = COUNT % 4 == 0 && ALL % 4 == 0 ? 4 : COUNT % 2 == 0 && ALL % 2 == 0 ? 2 : 1;
#pragma unroll
  for (int i = 0; i < COUNT; i += WIDE) {
    const bool there = lane * COUNT + i < ALL;
    if (WIDE == 4) {
      const uint4 four = there ? *(const uint4*)(from + i) : make_uint4(0, 0, 0, 0);
      to[i] = four.x, to[i + WIDE / 4] = four.y, to[i + WIDE / 2] = four.z, to[i + WIDE / 4 * 3] = four.w;
    } else if (WIDE == 2) {
      const uint2 two = there ? *(const uint2*)(from + i) : make_uint2(0, 0);
      to[i] = two.x, to[i + WIDE / 2] = two.y;
    } else {
      to[i] = there ? from[i] : 0;
    }
  }
}

// RUN neighbouring 16-bit numbers, two a word.
struct Run {
  u32 words[RUN / 2];

  __device__ __forceinline__ u16 at(int i) const { return (u16)(words[i / 2] >> 16 * (i % 2)); }

  __device__ __forceinline__ void load(const u16* from) {
    if (RUN == 8) {
      const uint4 four = *(const uint4*)from;
      words[0] = four.x, words[1] = four.y, words[RUN / 4] = four.z, words[RUN / 2 - 1] = four.w;
    } else {
      const uint2 two = *(const uint2*)from;
      words[0] = two.x, words[1] = two.y;
    }
  }

  __device__ __forceinline__ void load_each(const u16* from, int most) {
#pragma unroll
    for (int i = 0; i < RUN; i += 2) words[i / 2] = (u32)from[min(i, most)] | (u32)from[min(i + 1, most)] << 16;
  }
};

struct Store {
  const u8* codes;
  const u16* scale;
  const short* zero;
};

// COUNT neighbouring rows of a store for one lane, and the scales and zeros of RUN of them.
template <int COUNT, int WIDTH, int ALL, bool SYMMETRIC>
struct Rows {
  u32 words[COUNT][WIDTH];
  Run scale, zero;

  // slot: of the first row; others: of the first whose scale is wanted. Rows behind number `most` are read as that one.
  __device__ __forceinline__ void load(const Store& store, u64 slot, u64 others, int part, int most, int most_others, bool whole) {
    const u8* row = store.codes + slot * (ALL * 4);
    const u16 *scales = store.scale + others, *zeros = (const u16*)store.zero + others;
    if (whole) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) load_words<WIDTH, ALL>(words[i], row + i * ALL * 4, part);
      scale.load(scales);
      if (!SYMMETRIC) zero.load(zeros);
    } else {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) load_words<WIDTH, ALL>(words[i], row + min(i, most) * ALL * 4, part);
      scale.load_each(scales, most_others);
      if (!SYMMETRIC) zero.load_each(zeros, most_others);
    }
  }

  // A row's zero as nibbles count.
  __device__ __forceinline__ float zero_of(int i) const { return SYMMETRIC ? 8.0f : (float)(short)zero.at(i) + 8.0f; }
};

typedef Rows<RUN, OWN, WORDS, KEY_SYMMETRIC> Keys;
typedef Rows<2 * RUN, TURNS, VALUE_WORDS, VALUE_SYMMETRIC> Values;

// One lane's place in the launch, and where positions lie.
struct Work {
  Store keys, values;
  const int* table;
  u64 heads, slots, pages;
  int sequence, head, lane, length;
  bool whole_runs;  // every run of a page is aligned

  __device__ __forceinline__ u64 slot_of(int position) const {
    const u64 page = table ? table[(u64)sequence * pages + position / (int)slots] : sequence;
    return (page * heads + head) * slots + (table ? position % (int)slots : position);
  }

  __device__ __forceinline__ int left(int step) const { return length - step * STEP; }

  __device__ __forceinline__ void load_keys(Keys& to, int step) const {
    const int first = (lane >> 2) * RUN, there = left(step), at = min(first, (there - 1) / RUN * RUN);
    const u64 slot = slot_of(step * STEP + at);
    const int most = there - 1 - at;
    to.load(keys, slot, slot, lane & 3, most, most, there >= STEP && whole_runs);
  }

  __device__ __forceinline__ void load_values(Values& to, int step) const {
    const int first = (lane & 3) * 2 * RUN, there = left(step), at = min(first, (there - 1) / (2 * RUN) * 2 * RUN);
    const int scales = min((lane >> 2) * RUN, (there - 1) / RUN * RUN);
    to.load(values, slot_of(step * STEP + at), slot_of(step * STEP + scales), lane >> 2, there - 1 - at, there - 1 - scales,
            there >= STEP && whole_runs);
  }
};
