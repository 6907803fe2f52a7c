/* The CPU kernel: y = x . W^T, and W itself, for W[n,k] = table[code[n,k]] * scale[n, k / group].
 *
 * Layout: the checkpoint's own, read in place; nothing is repacked.
 *
 *   weight   uint8 (N, row_bytes); a row is one little-endian bit stream along k, `bits` per weight:
 *              bits=4   byte          0                1                2
 *                       bits 7..0     1111 0000        3333 2222        5555 4444        (digit: the k it belongs to)
 *              bits=3   bits 7..0     22 111 000       5 444 333 2      777 666 55
 *              bits=2   bits 7..0     33 22 11 00      77 66 55 44      ...
 *            With vector_size 2 one code of 2*bits bits stands for weights (2i, 2i+1).
 *   scales   (N, ceil(K / group)), float32, float16 or bfloat16
 *   x        float32, cut into strips: (ceil(K/256), M, 256), zero beyond K
 *
 * So 32 weights (a "unit") are 4*bits whole bytes whatever the format, and units are what gets decoded.
 *
 * Method
 *   Many tokens: decode a strip of 256 weights of 6 rows into float32 in L1, and multiply it by up to 32 tokens, 3 rows x 4
 *   tokens in registers (12 accumulators of 8 floats). One token (`dot`): the same without the stop in L1.
 *   Either way y[m,n] is summed by one thread, in 8 lanes, in ascending k, segment by segment (a segment is what one group
 *   and one strip share): sum += scale * (sum of products). Scaling a segment's sum is cheaper and more exact than scaling
 *   weights. The same operations in the same order, so results repeat bit for bit for any number of threads, and what a
 *   token gets does not depend on its batch. Groups that are not whole units scale the decoded weights instead.
 *
 *   AVX2, scalar tables: the float32 entries are 4 planes of 16 bytes; one pshufb looks up 32 codes in a plane, and unpacks
 *   interleave the planes back to floats. When all entries are exact in bfloat16 the two low planes are zero: half the
 *   lookups. (vpermps finds 8 floats of 8; a table of 16 needs two and a blend: measured 1.3-1.7 times slower at 4 bits.)
 *   Everything else: every table is a table of pairs, at most 256 of them (2 KiB), so an index of 2*bits bits fetches two
 *   weights with one 8-byte load.
 *
 * Given up: 8-bit activations (not exact); AVX-512 and NEON lookups (compiler vectors serve there); MSVC, which has no such
 * vectors: the extension is optional and PyTorch code takes over.
 *
 * No Python or PyTorch headers: ctypes calls the three functions at the end.
 */
#if !defined(__GNUC__)
#error "flute's CPU kernel needs GCC or Clang; without it flute uses its PyTorch code"
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "flute's CPU kernel needs a little-endian machine; without it flute uses its PyTorch code"
#endif
#include <pthread.h>
#include <stdint.h>
#include <string.h>

enum { UNIT = 32, STRIP = 256, ROWS = 6, TOKENS = 32, TILE_ROWS = 3, TILE_TOKENS = 4 };
enum { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

typedef float v8 __attribute__((vector_size(32)));
typedef float v8u __attribute__((vector_size(32), aligned(4), may_alias)); /* the same in memory, any alignment */
typedef uint64_t p4 __attribute__((vector_size(32)));                      /* four pairs of floats */
#define INLINE static inline __attribute__((always_inline))

typedef struct job job;
struct job {
    const uint8_t *weight;
    const void *scales;
    const float *x, *bias;
    void *out; /* y (M, N) or W (N, K), in the dtype of the scales */
    int64_t M, N, K, group, groups, row_bytes;
    int bits, dtype;
    int whole_units;      /* no unit is shared by two groups */
    uint64_t pair[256];   /* the table as pairs of float32 */
    int planes;           /* scalar table: 2 if the low two byte planes are zero, else 4 */
    uint8_t plane[4][16]; /* scalar table: byte b of float32 entry i, entries repeated up to 16 */
    uint8_t from[32];     /* where an AVX2 unit finds its codes, see prepare_avx2() */
    uint16_t factor[16];
    void (*decode)(const job *, const uint8_t *, int64_t, int, float *);
    void (*dot)(const job *, int64_t, v8 *); /* NULL where it does not apply */
    void (*block)(const job *, int64_t);
    int64_t next, blocks; /* the queue of work: blocks of ROWS rows */
};

/* ---- dtypes ---- */

INLINE float as_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
INLINE uint32_t as_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

INLINE float from_half(uint16_t h)
{
    uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16;
    if (magnitude >= 0x0f800000) return as_float(sign | 0x70000000 | magnitude); /* inf, nan */
    return as_float(sign | as_bits(as_float(magnitude) * 0x1p112f));              /* re-bias the exponent, exactly */
}

INLINE uint16_t to_half(float f) /* round to nearest even */
{
    uint32_t u = as_bits(f), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff, h;
    uint32_t normal = (a + 0xfff + ((a >> 13) & 1) - (112u << 23)) >> 13;
    uint32_t tiny = as_bits(as_float(a) + 0.5f) - as_bits(0.5f); /* the FPU rounds at 2^-24 */
    h = a < 0x38800000 ? tiny : normal;
    h = a >= 0x47800000 ? 0x7c00 : h;
    h = a > 0x7f800000 ? 0x7e00 : h;
    return (uint16_t)(sign | h);
}

INLINE uint16_t to_bfloat(float f) /* round to nearest even */
{
    uint32_t u = as_bits(f), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return (uint16_t)((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

INLINE float scale_at(const job *j, int64_t i)
{
    switch (j->dtype) {
    case FLOAT32: return ((const float *)j->scales)[i];
    case FLOAT16: return from_half(((const uint16_t *)j->scales)[i]);
    default: return as_float((uint32_t)((const uint16_t *)j->scales)[i] << 16);
    }
}

INLINE void store(const job *j, int64_t i, float f)
{
    switch (j->dtype) {
    case FLOAT32: ((float *)j->out)[i] = f; break;
    case FLOAT16: ((uint16_t *)j->out)[i] = to_half(f); break;
    default: ((uint16_t *)j->out)[i] = to_bfloat(f);
    }
}

/* ---- decoders ----
 * unit    16 bytes at q -> 32 table values in registers
 * decode  `units` units at p -> w; `left` bytes of the row remain at p
 * dot     sum[r] = row n+r . x, for 3 rows and one token. Whole units only, and not for the last rows of the matrix: a unit
 *         of fewer than 16 bytes is read on into the next row
 * Prefetches reach for the same place in the rows of the next block: hardware follows a row, but not to the next one. */

INLINE int64_t segment_end(int64_t k, int64_t group_end)
{
    const int64_t strip_end = (k / STRIP + 1) * STRIP;
    return group_end < strip_end ? group_end : strip_end;
}

/* The body of every `decode`; CALL makes f[0..3] of the unit at q. At the end of a row fewer than 16 bytes may be left. */
#define DECODE(CALL)                                                                                                   \
    uint8_t copy[16];                                                                                                  \
    for (int u = 0; u < units; u++, p += 4 * bits, left -= 4 * bits, w += UNIT) {                                      \
        const uint8_t *q = p;                                                                                          \
        v8 f[4];                                                                                                       \
        if (left < 16) q = memcpy(memset(copy, 0, 16), p, (size_t)left);                                               \
        __builtin_prefetch(p + ROWS * j->row_bytes);                                                                   \
        CALL;                                                                                                          \
        for (int i = 0; i < 4; i++) *(v8u *)(w + 8 * i) = f[i];                                                        \
    }

/* The body of every `dot`. It sums exactly as linear_block does. */
#define DOT(CALL)                                                                                                      \
    const uint8_t *p = j->weight + n * j->row_bytes;                                                                   \
    for (int r = 0; r < TILE_ROWS; r++) sum[r] = (v8){0};                                                              \
    for (int64_t k = 0, g = -1, group_end = 0; k < j->K;) {                                                            \
        if (k == group_end) g++, group_end = j->group < j->K - k ? k + j->group : j->K;                                \
        const int64_t end = segment_end(k, group_end);                                                                 \
        v8 a[TILE_ROWS] = {{0}};                                                                                       \
        for (; k < end; k += UNIT, p += 4 * bits)                                                                      \
            for (int r = 0; r < TILE_ROWS; r++) {                                                                      \
                const uint8_t *q = p + r * j->row_bytes;                                                               \
                v8 f[4];                                                                                               \
                __builtin_prefetch(q + TILE_ROWS * j->row_bytes);                                                      \
                CALL;                                                                                                  \
                for (int i = 0; i < 4; i++) a[r] += f[i] * *(const v8u *)(j->x + k + 8 * i);                           \
            }                                                                                                          \
        for (int r = 0; r < TILE_ROWS; r++) sum[r] += a[r] * scale_at(j, (n + r) * j->groups + g);                     \
    }

INLINE void unit_pairs(const uint64_t *t, const uint8_t *q, v8 *f, const int bits)
{
    const uint32_t mask = (1u << 2 * bits) - 1;
    for (int i = 0; i < 4; i++) { /* 8 codes are `bits` bytes */
        uint32_t c;
        memcpy(&c, q + i * bits, 4);
        f[i] = (v8)(p4){t[c & mask], t[c >> 2 * bits & mask], t[c >> 4 * bits & mask], t[c >> 6 * bits & mask]};
    }
}

INLINE void decode_pairs(const job *j, const uint8_t *p, int64_t left, int units, float *w)
{
    const int bits = j->bits;
    DECODE(unit_pairs(j->pair, q, f, bits))
}

INLINE void dot_pairs_bits(const job *j, int64_t n, v8 *sum, const int bits) { DOT(unit_pairs(j->pair, q, f, bits)) }

INLINE void dot_pairs(const job *j, int64_t n, v8 *sum) /* constant shifts: twice as fast */
{
    if (j->bits == 4) dot_pairs_bits(j, n, sum, 4);
    else if (j->bits == 3) dot_pairs_bits(j, n, sum, 3);
    else dot_pairs_bits(j, n, sum, 2);
}

/* ---- a block of ROWS rows ---- */

/* One strip of row n as float32: table values of weights k0 .. k0+len, times their scales if asked, then
 * zeros up to a whole unit. */
INLINE void strip(const job *j, int64_t n, int64_t k0, int len, int scaled, float *w)
{
    const int units = (len + UNIT - 1) / UNIT;
    const int64_t at = k0 / 8 * j->bits;
    j->decode(j, j->weight + n * j->row_bytes + at, j->row_bytes - at, units, w);
    for (int64_t k = 0, g = k0 / j->group; scaled && k < len; g++) {
        const int64_t end = j->group < j->K ? (g + 1) * j->group - k0 : len;
        const float s = scale_at(j, n * j->groups + g);
        for (; k < end && k < len; k++) w[k] *= s;
    }
    if (len % UNIT) memset(w + len, 0, sizeof(float) * (size_t)(units * UNIT - len));
}

/* sum[r][t] += scale[r] * (w[r] . x[t]) over len weights (a multiple of 8), for 3 rows and T tokens held in registers. */
INLINE void tile(const float *w, const float *x, const float *scale, int len, v8 (*sum)[TOKENS], const int T)
{
    v8 a[TILE_ROWS][TILE_TOKENS] = {{{0}}};
    for (int k = 0; k < len; k += 8)
        for (int r = 0; r < TILE_ROWS; r++) {
            const v8 wr = *(const v8u *)(w + r * STRIP + k);
            for (int t = 0; t < T; t++) a[r][t] += wr * *(const v8u *)(x + t * STRIP + k);
        }
    for (int r = 0; r < TILE_ROWS; r++)
        for (int t = 0; t < T; t++) sum[r][t] += a[r][t] * scale[r];
}

/* All the tiles of a segment. */
INLINE void segment(const float *w, const float *x, const float *scale, int len, int rows, int tokens, v8 (*sum)[TOKENS])
{
    for (int r = 0; r < rows; r += TILE_ROWS, w += TILE_ROWS * STRIP, scale += TILE_ROWS, sum += TILE_ROWS)
        for (int t = 0; t < tokens; t += TILE_TOKENS) {
            v8(*s)[TOKENS] = (v8(*)[TOKENS])(sum[0] + t);
            switch (tokens - t) {
            case 1: tile(w, x + t * STRIP, scale, len, s, 1); break;
            case 2: tile(w, x + t * STRIP, scale, len, s, 2); break;
            case 3: tile(w, x + t * STRIP, scale, len, s, 3); break;
            default: tile(w, x + t * STRIP, scale, len, s, 4);
            }
        }
}

INLINE void finish(const job *j, int64_t m, int64_t n, const v8 *sum)
{
    const v8 s = *sum;
    const float y = ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
    store(j, m * j->N + n, j->bias ? y + j->bias[n] : y);
}

INLINE void linear_block(const job *j, int64_t block)
{
    const int64_t n0 = block * ROWS;
    const int rows = j->N - n0 < ROWS ? (int)(j->N - n0) : ROWS;
    float w[ROWS * STRIP] __attribute__((aligned(64))), scale[ROWS] = {0};
    v8 sum[ROWS][TOKENS];
    if (rows < ROWS) memset(w, 0, sizeof w); /* rows beyond N are multiplied too, so they must hold something */
    if (j->dot && n0 + 2 * ROWS <= j->N) {
        for (int r = 0; r < ROWS; r += TILE_ROWS) j->dot(j, n0 + r, sum[0] + r);
        for (int r = 0; r < ROWS; r++) finish(j, 0, n0 + r, sum[0] + r);
        return;
    }
    for (int64_t m0 = 0; m0 < j->M; m0 += TOKENS) {
        const int tokens = j->M - m0 < TOKENS ? (int)(j->M - m0) : TOKENS;
        for (int r = 0; r < ROWS; r++) memset(sum[r], 0, sizeof(v8) * (size_t)tokens);
        for (int64_t k0 = 0; k0 < j->K; k0 += STRIP) {
            const int len = j->K - k0 < STRIP ? (int)(j->K - k0) : STRIP;
            for (int r = 0; r < rows; r++) strip(j, n0 + r, k0, len, !j->whole_units, w + r * STRIP);
            for (int64_t k = k0, end; k < k0 + len; k = end) {
                const int64_t g = k / j->group;
                end = segment_end(k, j->whole_units && j->group < j->K - g * j->group ? (g + 1) * j->group : j->K);
                for (int r = 0; r < rows; r++) scale[r] = j->whole_units ? scale_at(j, (n0 + r) * j->groups + g) : 1.0f;
                segment(w + (k - k0), j->x + k0 * j->M + m0 * STRIP + (k - k0), scale, (int)(end - k + 7) / 8 * 8, rows,
                        tokens, sum);
            }
        }
        for (int t = 0; t < tokens; t++)
            for (int r = 0; r < rows; r++) finish(j, m0 + t, n0 + r, sum[r] + t);
    }
}

/* W needs every product table * scale on its own, rounded to float32 and then to the dtype. */
INLINE void dequantize_block(const job *j, int64_t block)
{
    float w[STRIP] __attribute__((aligned(64)));
    for (int64_t k0 = 0; k0 < j->K; k0 += STRIP) {
        const int len = j->K - k0 < STRIP ? (int)(j->K - k0) : STRIP;
        for (int64_t n = block * ROWS; n < j->N && n < (block + 1) * ROWS; n++) {
            const int64_t at = n * j->K + k0;
            strip(j, n, k0, len, 1, w);
            if (j->dtype == FLOAT32) memcpy((float *)j->out + at, w, sizeof(float) * (size_t)len);
            uint16_t *out = (uint16_t *)j->out + at;
            if (j->dtype == FLOAT16) for (int k = 0; k < len; k++) out[k] = to_half(w[k]);
            if (j->dtype == BFLOAT16) for (int k = 0; k < len; k++) out[k] = to_bfloat(w[k]);
        }
    }
}

/* Everything above is inlined once per instruction set. */
#define INSTANCES(SUFFIX, TARGET)                                                                                      \
    TARGET static void decode_pairs_##SUFFIX(const job *j, const uint8_t *p, int64_t left, int units, float *w)        \
    {                                                                                                                  \
        decode_pairs(j, p, left, units, w);                                                                            \
    }                                                                                                                  \
    TARGET static void dot_pairs_##SUFFIX(const job *j, int64_t n, v8 *sum) { dot_pairs(j, n, sum); }                  \
    TARGET static void linear_##SUFFIX(const job *j, int64_t block) { linear_block(j, block); }                        \
    TARGET static void dequantize_##SUFFIX(const job *j, int64_t block) { dequantize_block(j, block); }

INSTANCES(portable, )

/* ---- AVX2 ---- */
#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,bmi2")))

INSTANCES(avx2, AVX2)

static int has_avx2(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

/* Which two codes 16-bit word i of a unit's indices takes. Unpacking bytes and then words stays within 128-bit lanes, and
 * makes bytes 0-3 of both lanes the first 8 floats; so lane 0 takes codes 0-3 8-11 16-19 24-27, lane 1 the others. */
static void prepare_avx2(job *j)
{
    for (int i = 0; i < 16; i++) {
        const int code = i % 8 / 2 * 8 + i / 8 * 4 + i % 2 * 2;
        const int bit = code * j->bits; /* even, and two codes are at most 8 bits: two bytes hold them, one at 4 bits */
        j->from[2 * i] = (uint8_t)(bit / 8);
        j->from[2 * i + 1] = (uint8_t)(j->bits == 4 ? bit / 8 : bit / 8 + 1);
        j->factor[i] = (uint16_t)(1 << (16 - 2 * j->bits - bit % 8)); /* shifts the two codes to the top of the word */
    }
}

typedef struct { __m256i from, factor, plane[4]; } lookup;

AVX2 INLINE lookup load_lookup(const job *j)
{
    lookup t = {.from = _mm256_loadu_si256((const __m256i *)j->from),
                .factor = _mm256_loadu_si256((const __m256i *)j->factor)};
    for (int b = 0; b < 4; b++)
        t.plane[b] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)j->plane[b]));
    return t;
}

AVX2 INLINE void unit_planes(const lookup *t, const uint8_t *q, v8 *f, const int bits, const int planes)
{
    const __m256i low = _mm256_set1_epi16((1 << bits) - 1), high = _mm256_slli_epi16(low, 8);
    __m256i c = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)q));
    c = _mm256_shuffle_epi8(c, t->from);
    if (bits == 4) /* a word is one byte twice: first code in its low half, second in its high half */
        c = _mm256_or_si256(_mm256_and_si256(c, low), _mm256_and_si256(_mm256_srli_epi16(c, 4), high));
    else { /* above its code the low byte keeps bits of the second one: entries repeat, so they do not matter */
        c = _mm256_mullo_epi16(c, t->factor);
        c = _mm256_or_si256(_mm256_srli_epi16(c, 16 - 2 * bits), _mm256_and_si256(_mm256_srli_epi16(c, 8 - bits), high));
    }
    const __m256i b3 = _mm256_shuffle_epi8(t->plane[3], c), b2 = _mm256_shuffle_epi8(t->plane[2], c);
    const __m256i high0 = _mm256_unpacklo_epi8(b2, b3), high1 = _mm256_unpackhi_epi8(b2, b3);
    __m256i low0 = _mm256_setzero_si256(), low1 = low0;
    if (planes == 4) {
        const __m256i b1 = _mm256_shuffle_epi8(t->plane[1], c), b0 = _mm256_shuffle_epi8(t->plane[0], c);
        low0 = _mm256_unpacklo_epi8(b0, b1), low1 = _mm256_unpackhi_epi8(b0, b1);
    }
    f[0] = (v8)_mm256_unpacklo_epi16(low0, high0);
    f[1] = (v8)_mm256_unpackhi_epi16(low0, high0);
    f[2] = (v8)_mm256_unpacklo_epi16(low1, high1);
    f[3] = (v8)_mm256_unpackhi_epi16(low1, high1);
}

AVX2 INLINE void decode_planes(const job *j, const uint8_t *p, int64_t left, int units, float *w, const int bits,
                               const int planes)
{
    const lookup t = load_lookup(j);
    DECODE(unit_planes(&t, q, f, bits, planes))
}

AVX2 INLINE void dot_planes(const job *j, int64_t n, v8 *sum, const int bits, const int planes)
{
    const lookup t = load_lookup(j);
    DOT(unit_planes(&t, q, f, bits, planes))
}

AVX2 static void decode_planes_avx2(const job *j, const uint8_t *p, int64_t left, int units, float *w)
{
    switch (10 * j->bits + j->planes) {
    case 22: decode_planes(j, p, left, units, w, 2, 2); break;
    case 24: decode_planes(j, p, left, units, w, 2, 4); break;
    case 32: decode_planes(j, p, left, units, w, 3, 2); break;
    case 34: decode_planes(j, p, left, units, w, 3, 4); break;
    case 42: decode_planes(j, p, left, units, w, 4, 2); break;
    case 44: decode_planes(j, p, left, units, w, 4, 4); break;
    }
}

AVX2 static void dot_planes_avx2(const job *j, int64_t n, v8 *sum)
{
    switch (10 * j->bits + j->planes) {
    case 22: dot_planes(j, n, sum, 2, 2); break;
    case 24: dot_planes(j, n, sum, 2, 4); break;
    case 32: dot_planes(j, n, sum, 3, 2); break;
    case 34: dot_planes(j, n, sum, 3, 4); break;
    case 42: dot_planes(j, n, sum, 4, 2); break;
    case 44: dot_planes(j, n, sum, 4, 4); break;
    }
}
#endif

/* ---- threads ----
 * The caller passes the GOMP_parallel of the OpenMP runtime PyTorch has already loaded, if there is one: its pool is warm,
 * and a second pool would fight the first one's spinning workers for the cores. Otherwise plain threads, made per call.
 * Whichever thread takes a block, the block's results are the same. */

static void *work(void *arg)
{
    job *j = arg;
    for (int64_t b; (b = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED)) < j->blocks;) j->block(j, b);
    return NULL;
}

static void work_omp(void *arg) { work(arg); }

typedef void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);

static void run(job *j, int threads, gomp_parallel parallel)
{
    enum { MOST = 256 };
    pthread_t thread[MOST];
    int started = 0;
    const int64_t worth = 1 + j->N * j->K / 65536; /* waking a thread takes as long as decoding so many weights */
    if (threads > worth) threads = (int)worth;
    if (threads > j->blocks) threads = (int)j->blocks;
    if (threads > 1 && parallel) {
        parallel(work_omp, j, (unsigned)threads, 0);
        return;
    }
    while (started < threads - 1 && started < MOST && !pthread_create(&thread[started], NULL, work, j)) started++;
    work(j);
    while (started > 0) pthread_join(thread[--started], NULL);
}

static void prepare(job *j, const float *table, int vector_size, int portable)
{
    const int bits = j->bits, entries = 1 << bits;
    uint32_t all = 0;
    if (vector_size == 2) memcpy(j->pair, table, sizeof(uint64_t) << 2 * bits);
    else
        for (int i = 0; i < 1 << 2 * bits; i++)
            j->pair[i] = as_bits(table[i % entries]) | (uint64_t)as_bits(table[i / entries]) << 32;
    for (int i = 0; vector_size == 1 && i < 16; i++) {
        const uint32_t u = as_bits(table[i % entries]);
        all |= u;
        for (int b = 0; b < 4; b++) j->plane[b][i] = (uint8_t)(u >> 8 * b);
    }
    j->planes = all & 0xffff ? 4 : 2;
    j->row_bytes = ((j->K + vector_size - 1) / vector_size * vector_size * bits + 7) / 8;
    j->groups = (j->K + j->group - 1) / j->group;
    j->whole_units = j->group % UNIT == 0 || j->group >= j->K;
    j->blocks = (j->N + ROWS - 1) / ROWS;
    const int whole = j->M == 1 && j->whole_units && j->K % UNIT == 0;
    j->decode = decode_pairs_portable;
    j->dot = whole ? dot_pairs_portable : NULL;
    (void)portable;
#if defined(__x86_64__)
    if (portable || !has_avx2()) return;
    prepare_avx2(j);
    j->decode = vector_size == 2 ? decode_pairs_avx2 : decode_planes_avx2;
    if (whole) j->dot = vector_size == 2 ? dot_pairs_avx2 : dot_planes_avx2;
    j->block = j->block == linear_portable ? linear_avx2 : dequantize_avx2;
#endif
}

/* ---- what Python calls ----
 * x, table and bias are float32; dtype is that of the scales, y and w. portable != 0 leaves AVX2 aside (for tests). */

int flute_cpu_version(void) { return 2; }

void flute_cpu_linear(void *y, const float *x, const uint8_t *weight, const void *scales, const float *table,
                      const float *bias, int64_t M, int64_t N, int64_t K, int64_t group, int bits, int vector_size,
                      int dtype, int threads, gomp_parallel parallel, int portable)
{
    job j = {.weight = weight, .scales = scales, .x = x, .bias = bias, .out = y, .M = M, .N = N, .K = K, .group = group,
             .bits = bits, .dtype = dtype, .block = linear_portable};
    prepare(&j, table, vector_size, portable);
    run(&j, threads, parallel);
}

void flute_cpu_dequantize(void *w, const uint8_t *weight, const void *scales, const float *table, int64_t N, int64_t K,
                          int64_t group, int bits, int vector_size, int dtype, int threads, gomp_parallel parallel,
                          int portable)
{
    job j = {.weight = weight, .scales = scales, .out = w, .N = N, .K = K, .group = group, .bits = bits, .dtype = dtype,
             .block = dequantize_portable};
    prepare(&j, table, vector_size, portable);
    run(&j, threads, parallel);
}
