/* How each set of instructions decodes 32 weights, and the loops of _cpu_block.h compiled for it.
 *
 * A set defines prepare_SET(job): where in a unit codes lie; lookup_SET: what stays in registers, made by load_SET(job);
 * unit_SET(lookup, q, f, bits, planes): 16 bytes at q -> f, 32 table values in order. Its FORMATS list the cases, 10 * bits +
 * planes, that its unit has code for; planes is 0 for pairs, and what job.planes says for scalar tables.
 *
 * Pairs: every table is a table of pairs, at most 256 of them (2 KiB), so an index of 2*bits bits fetches two weights with one
 * 8-byte load. Scalar tables are looked up in registers:
 *   AVX-512          vpermps finds 16 floats of 16 and ignores the bits above an index: shift the code down, look it up.
 *   AVX2, 2-3 bits   the same with 8 floats of 8. (4 bits would need two and a blend: measured 1.3-1.7 times slower.)
 *   AVX2 at 4 bits,  the float32 entries are 4 planes of 16 bytes; one pshufb looks up 32 codes in a plane (tbl: 16), and the
 *   NEON             planes are interleaved back to floats. When all entries are exact in bfloat16 the two low planes are
 *                    zero: half the lookups.
 */
typedef uint64_t two_floats __attribute__((may_alias));

INLINE void unit_pairs(const uint64_t *t, const uint8_t *q, void *f, const int bits)
{
    const uint32_t mask = (1u << 2 * bits) - 1;
    two_floats *pair = f;
    UNROLL for (int i = 0; i < 4; i++) { /* 8 codes are `bits` bytes */
        uint32_t c;
        memcpy(&c, q + i * bits, 4);
        UNROLL for (int e = 0; e < 4; e++) pair[4 * i + e] = t[c >> 2 * bits * e & mask];
    }
}

#define PAIR_FORMATS(F)                                                                                                \
    case 20: F(2, 0); break;                                                                                           \
    case 30: F(3, 0); break;                                                                                           \
    case 40: F(4, 0); break;
/* ---- plain C ---- */

#define TARGET
#define NAME(f) f##_portable
#define LANES 8
#define FORMATS(F) PAIR_FORMATS(F)
typedef struct { const uint64_t *pair; } lookup_portable;
#define lookup lookup_portable
INLINE lookup load_portable(const job *j) { return (lookup){j->pair}; }
INLINE void unit_portable(const lookup *t, const uint8_t *q, void *f, const int bits, const int planes)
{
    (void)planes;
    unit_pairs(t->pair, q, f, bits);
}
#include "_cpu_block.h"

#if defined(__x86_64__)
#include <immintrin.h>

/* ---- AVX2 ---- */

#define TARGET __attribute__((target("avx2,fma")))
#define NAME(f) f##_avx2
#define LANES 8
#define FORMATS(F)                                                                                                     \
    PAIR_FORMATS(F)                                                                                                    \
    case 21: F(2, 1); break;                                                                                           \
    case 31: F(3, 1); break;                                                                                           \
    case 42: F(4, 2); break;                                                                                           \
    case 44: F(4, 4); break;

/* At 4 bits the lookups return bytes in the order of the codes, unpacking bytes makes 16-bit words of them, and a vector of
 * words becomes two of floats: its even words and its odd words. So that floats come out in order, byte pair i of lane h
 * holds codes c and c + 8, where c = i % 4 + 4h + (i < 4 ? 0 : 16); both are the same half of bytes c / 2 and c / 2 + 4. */
static void prepare_avx2(job *j)
{
    for (int i = 0; i < 32; i++) j->from[i] = (uint8_t)((i / 2 % 4 + i / 16 * 4 + i / 8 % 2 * 16 + i % 2 * 8) / 2);
    for (int i = 0; i < 8; i++) j->shift[i] = (uint32_t)(i * j->bits);
    if (j->planes && j->bits < 4) j->planes = 1;
}

typedef struct { const uint64_t *pair; __m256i from, shift, plane[4]; __m256 entry; } lookup_avx2;
#define lookup lookup_avx2

TARGET INLINE lookup load_avx2(const job *j)
{
    lookup t = {.pair = j->pair, .from = _mm256_loadu_si256((const __m256i *)j->from),
                .shift = _mm256_loadu_si256((const __m256i *)j->shift), .entry = _mm256_loadu_ps(j->entry)};
    for (int b = 0; b < 4; b++)
        t.plane[b] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)j->plane[b]));
    return t;
}

TARGET INLINE void unit_avx2(const lookup *t, const uint8_t *q, void *to, const int bits, const int planes)
{
    if (planes == 0) { unit_pairs(t->pair, q, to, bits); return; }
    __m256i *f = to;
    if (bits < 4) { /* 8 codes fit a 32-bit word; vpermps finds 8 floats of 8 and ignores the bits above an index */
        for (int i = 0; i < 4; i++) {
            int32_t c;
            memcpy(&c, q + i * bits, 4);
            f[i] = (__m256i)_mm256_permutevar8x32_ps(t->entry, _mm256_srlv_epi32(_mm256_set1_epi32(c), t->shift));
        }
        return;
    }
    __m256i c = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)q)), t->from);
    c = _mm256_blend_epi16(c, _mm256_srli_epi16(c, 4), 0xaa); /* word i is of low halves, word i + 1 of high halves */
    c = _mm256_and_si256(c, _mm256_set1_epi8(15));
    const __m256i b3 = _mm256_shuffle_epi8(t->plane[3], c), b2 = _mm256_shuffle_epi8(t->plane[2], c);
    const __m256i high[2] = {_mm256_unpacklo_epi8(b2, b3), _mm256_unpackhi_epi8(b2, b3)};
    const __m256i odd = _mm256_set1_epi32((int)0xffff0000);
    if (planes == 2) {
        for (int i = 0; i < 2; i++)
            f[2 * i] = _mm256_slli_epi32(high[i], 16), f[2 * i + 1] = _mm256_and_si256(high[i], odd);
        return;
    }
    const __m256i b1 = _mm256_shuffle_epi8(t->plane[1], c), b0 = _mm256_shuffle_epi8(t->plane[0], c);
    const __m256i low[2] = {_mm256_unpacklo_epi8(b0, b1), _mm256_unpackhi_epi8(b0, b1)};
    for (int i = 0; i < 2; i++) {
        f[2 * i] = _mm256_blend_epi16(low[i], _mm256_slli_epi32(high[i], 16), 0xaa);
        f[2 * i + 1] = _mm256_blend_epi16(_mm256_srli_epi32(low[i], 16), high[i], 0xaa);
    }
}
#include "_cpu_block.h"

/* ---- AVX-512 ---- */

#define TARGET __attribute__((target("avx512f,avx512bw,avx2,fma")))
#define NAME(f) f##_avx512
#define LANES 16
#define FORMATS(F) /* not pairs: assembling wider vectors of them takes longer than AVX2's, measured 1.7 times at 4 bits */ \
    case 21: F(2, 1); break;                                                                                           \
    case 31: F(3, 1); break;                                                                                           \
    case 41: F(4, 1); break;

static void prepare_avx512(job *j) /* 32-bit word i: the two bytes that hold code i */
{
    for (int i = 0; i < UNIT; i++) {
        const uint8_t byte = (uint8_t)(i * j->bits / 8), from[4] = {byte, (uint8_t)((byte + 1) & 15), 0x80, 0x80};
        memcpy(j->from + 4 * i, from, 4);
        j->shift[i] = (uint32_t)(i * j->bits % 8);
    }
    j->planes = 1;
}

typedef struct { __m512i from[2], shift[2]; __m512 entry; } lookup_avx512;
#define lookup lookup_avx512

TARGET INLINE lookup load_avx512(const job *j)
{
    lookup t = {.entry = _mm512_loadu_ps(j->entry)};
    for (int h = 0; h < 2; h++)
        t.from[h] = _mm512_loadu_si512(j->from + 64 * h), t.shift[h] = _mm512_loadu_si512(j->shift + 16 * h);
    return t;
}

TARGET INLINE void unit_avx512(const lookup *t, const uint8_t *q, void *to, const int bits, const int planes)
{
    (void)bits, (void)planes;
    __m512 *f = to;
    const __m512i c = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)q));
    for (int h = 0; h < 2; h++) /* bits of the next code are above the index, or find a repeated entry */
        f[h] = _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_shuffle_epi8(c, t->from[h]), t->shift[h]), t->entry);
}
#include "_cpu_block.h"

#elif defined(__aarch64__)
#include <arm_neon.h>

/* ---- NEON ---- */

#define TARGET
#define NAME(f) f##_neon
#define LANES 4
#define FORMATS(F)                                                                                                     \
    PAIR_FORMATS(F)                                                                                                    \
    case 22: F(2, 2); break;                                                                                           \
    case 24: F(2, 4); break;                                                                                           \
    case 32: F(3, 2); break;                                                                                           \
    case 34: F(3, 4); break;                                                                                           \
    case 42: F(4, 2); break;                                                                                           \
    case 44: F(4, 4); break;

static void prepare_neon(job *j) /* 16-bit word i: the two bytes that hold code i */
{
    for (int i = 0; i < UNIT; i++) {
        j->from[2 * i] = (uint8_t)(i * j->bits / 8);
        j->from[2 * i + 1] = (uint8_t)((i * j->bits / 8 + 1) & 15);
        ((int16_t *)j->shift)[i] = (int16_t)-(i * j->bits % 8);
    }
}

typedef uint16x8_t words_neon __attribute__((may_alias));
typedef struct { const uint64_t *pair; uint8x16_t from[4], plane[4]; int16x8_t shift[4]; } lookup_neon;
#define lookup lookup_neon

INLINE lookup load_neon(const job *j)
{
    lookup t = {.pair = j->pair};
    for (int b = 0; b < 4; b++) {
        t.from[b] = vld1q_u8(j->from + 16 * b), t.plane[b] = vld1q_u8(j->plane[b]);
        t.shift[b] = vld1q_s16((const int16_t *)j->shift + 8 * b);
    }
    return t;
}

INLINE uint16x8_t word_neon(const lookup *t, uint8x16_t v, int i) /* codes 8i .. 8i+7 */
{
    return vshlq_u16(vreinterpretq_u16_u8(vqtbl1q_u8(v, t->from[i])), t->shift[i]);
}

INLINE void unit_neon(const lookup *t, const uint8_t *q, void *to, const int bits, const int planes)
{
    if (planes == 0) { unit_pairs(t->pair, q, to, bits); return; }
    words_neon *f = to;
    const uint8x16_t v = vld1q_u8(q), mask = vdupq_n_u8((uint8_t)((1 << bits) - 1));
    const uint8x16_t even = vandq_u8(v, mask), odd = vshrq_n_u8(v, 4);
    UNROLL for (int h = 0; h < 2; h++) {
        uint8x16_t c = h ? vzip2q_u8(even, odd) : vzip1q_u8(even, odd);
        if (bits < 4)
            c = vandq_u8(vuzp1q_u8(vreinterpretq_u8_u16(word_neon(t, v, 2 * h)),
                                   vreinterpretq_u8_u16(word_neon(t, v, 2 * h + 1))), mask);
        const uint8x16_t b2 = vqtbl1q_u8(t->plane[2], c), b3 = vqtbl1q_u8(t->plane[3], c);
        uint8x16_t b0 = vdupq_n_u8(0), b1 = b0;
        if (planes == 4) b0 = vqtbl1q_u8(t->plane[0], c), b1 = vqtbl1q_u8(t->plane[1], c);
        const uint16x8_t low0 = vreinterpretq_u16_u8(vzip1q_u8(b0, b1)), high0 = vreinterpretq_u16_u8(vzip1q_u8(b2, b3));
        const uint16x8_t low1 = vreinterpretq_u16_u8(vzip2q_u8(b0, b1)), high1 = vreinterpretq_u16_u8(vzip2q_u8(b2, b3));
        f[4 * h + 0] = vzip1q_u16(low0, high0), f[4 * h + 1] = vzip2q_u16(low0, high0);
        f[4 * h + 2] = vzip1q_u16(low1, high1), f[4 * h + 3] = vzip2q_u16(low1, high1);
    }
}
#include "_cpu_block.h"
#endif
