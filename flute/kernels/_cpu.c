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
 *   scales   (N, ceil(K / group)); x (M, K), table and bias: all of one dtype, float32, float16 or bfloat16
 *
 * So 32 weights (a "unit") are 4*bits whole bytes whatever the format, and units are what gets decoded.
 *
 * Method (loops: _cpu_block.h; decoding: _cpu_sets.h, once per set of instructions)
 *   x becomes float32. Many tokens: decode a strip of 256 weights of 12 rows into float32 in L1, and multiply it by up to 64
 *   tokens, 3 rows x 4 tokens in registers. One token: 6 rows at once and no stop in L1.
 *   Every sum is made by one thread in a fixed order, so results repeat bit for bit for any number of threads, and a token's
 *   do not depend on the others of its batch. Up to 8 tokens a segment's sum of products is scaled, which costs less than
 *   scaling weights; for more tokens, and for groups that are not whole units, the decoded weights are.
 *
 * Given up: 8-bit activations (not exact); MSVC, which has no vector types: the extension is optional and PyTorch code takes
 * over.
 *
 * No Python or PyTorch headers: ctypes calls the functions at the end.
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

enum { UNIT = 32, STRIP = 256, ROWS = 12, DOT_ROWS = 6, TOKENS = 64, FEW = 8, SCALES = 64 };
enum { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };
enum { PORTABLE = 0, REGISTERS = 1, WIDE = 2 }; /* sets of instructions: plain C; AVX2 or NEON; AVX-512 */

#define INLINE static inline __attribute__((always_inline))
#define APART __attribute__((noinline)) /* registers are allotted better to one loop at a time */
#define UNROLL _Pragma("GCC unroll 8")

typedef struct job job;
struct job {
    const uint8_t *weight;
    const void *scales, *bias;
    float *x;  /* cut into strips: (ceil(K/256), M, 256), zero beyond K */
    void *out; /* y (M, N) or W (N, K) */
    int64_t M, N, K, group, groups, row_bytes;
    int bits, dtype;
    int scale_sums;         /* scale the sums of segments, not weights: needs units that no two groups share */
    int dot;                /* one token, and all units are whole */
    int planes;             /* 0: table of pairs; scalar table: 2 if the low two byte planes are zero, else 4 */
    uint64_t pair[256];     /* the table as pairs of float32 */
    float entry[16];        /* scalar table, entries repeated up to 16 */
    uint8_t plane[4][16];   /* byte b of float32 entry i */
    uint8_t from[128];      /* where a unit finds its codes, and how far they are to be shifted: see each set's prepare */
    uint32_t shift[32];
    void (*block)(const job *, int64_t);
    int64_t next, blocks, stride; /* the queue of work: blocks of ROWS rows, `stride` taken at a time */
};

/* ---- numbers ---- */

INLINE float as_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
INLINE uint32_t as_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

INLINE float from_half(uint16_t h)
{
    uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16;
    uint32_t finite = as_bits(as_float(magnitude) * 0x1p112f); /* re-bias the exponent, exactly */
    return as_float(sign | (magnitude >= 0x0f800000 ? 0x70000000 | magnitude : finite));
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

INLINE float number(const void *p, int64_t i, int dtype)
{
    switch (dtype) {
    case FLOAT32: return ((const float *)p)[i];
    case FLOAT16: return from_half(((const uint16_t *)p)[i]);
    default: return as_float((uint32_t)((const uint16_t *)p)[i] << 16);
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

INLINE void numbers(const void *p, int64_t at, int count, int dtype, float *to) /* the dtype is asked once */
{
    if (dtype == FLOAT32) memcpy(to, (const float *)p + at, sizeof(float) * (size_t)count);
    else if (dtype == FLOAT16) for (int i = 0; i < count; i++) to[i] = number(p, at + i, FLOAT16);
    else for (int i = 0; i < count; i++) to[i] = number(p, at + i, BFLOAT16);
}

/* The scales of group g of some rows from n on; the dtype is asked once. */
INLINE void scales_of(const job *j, int64_t n, int rows, int64_t g, float *scale)
{
    const int64_t at = n * j->groups + g;
#define EACH(DTYPE) for (int r = 0; r < rows; r++) scale[r] = number(j->scales, at + r * j->groups, DTYPE)
    if (j->dtype == BFLOAT16) EACH(BFLOAT16);
    else if (j->dtype == FLOAT16) EACH(FLOAT16);
    else EACH(FLOAT32);
#undef EACH
}

INLINE int64_t segment_end(int64_t k, int64_t group_end)
{
    const int64_t strip_end = (k / STRIP + 1) * STRIP;
    return group_end < strip_end ? group_end : strip_end;
}

#include "_cpu_sets.h"

/* ---- threads ----
 * The caller passes the GOMP_parallel of the OpenMP runtime PyTorch has already loaded, if there is one: its pool is warm,
 * and a second pool would fight the first one's spinning workers for the cores. Otherwise plain threads, made per call.
 * Whichever thread takes a block, the block's results are the same. */

static void *work(void *arg)
{
    job *j = arg;
    for (int64_t b; (b = __atomic_fetch_add(&j->next, j->stride, __ATOMIC_RELAXED)) < j->blocks;)
        for (int64_t end = b + j->stride; b < end && b < j->blocks; b++) j->block(j, b);
    return NULL;
}

static void work_omp(void *arg) { work(arg); }

typedef void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);

static void run(job *j, int threads, gomp_parallel parallel)
{
    enum { MOST = 256 };
    pthread_t thread[MOST];
    int started = 0;
    /* waking a thread takes as long as decoding 65536 weights for one token; each further token adds a third of that */
    const int64_t worth = 1 + j->N * j->K * (2 + j->M) / (3 * 65536);
    if (threads > worth) threads = (int)worth;
    if (threads > j->blocks) threads = (int)j->blocks;
    j->stride = 1 + j->blocks / (16 * threads); /* neighbours, so that what one block prefetches serves the next */
    if (threads > 1 && parallel) {
        parallel(work_omp, j, (unsigned)threads, 0);
        return;
    }
    while (started < threads - 1 && started < MOST && !pthread_create(&thread[started], NULL, work, j)) started++;
    work(j);
    while (started > 0) pthread_join(thread[--started], NULL);
}

/* ---- what Python calls ---- */

/* The best set of instructions that this machine has. */
int flute_cpu_best(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return PORTABLE;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") ? WIDE : REGISTERS;
#elif defined(__aarch64__)
    return REGISTERS;
#else
    return PORTABLE;
#endif
}

static void prepare(job *j, const void *table, int vector_size)
{
    const int bits = j->bits, entries = 1 << bits;
    uint32_t all = 0;
    for (int i = 0; i < 1 << 2 * bits; i++) {
        const int first = vector_size == 2 ? 2 * i : i % entries, second = vector_size == 2 ? 2 * i + 1 : i / entries;
        j->pair[i] = as_bits(number(table, first, j->dtype)) | (uint64_t)as_bits(number(table, second, j->dtype)) << 32;
    }
    for (int i = 0; vector_size == 1 && i < 16; i++) {
        const uint32_t u = (uint32_t)j->pair[i % entries];
        all |= u;
        j->entry[i] = as_float(u);
        for (int b = 0; b < 4; b++) j->plane[b][i] = (uint8_t)(u >> 8 * b);
    }
    j->planes = vector_size == 2 ? 0 : all & 0xffff ? 4 : 2;
    j->row_bytes = ((j->K + vector_size - 1) / vector_size * vector_size * bits + 7) / 8;
    j->groups = (j->K + j->group - 1) / j->group;
    j->scale_sums = j->M <= FEW && (j->group % UNIT == 0 || j->group >= j->K);
    j->blocks = (j->N + ROWS - 1) / ROWS;
    j->dot = j->M == 1 && j->scale_sums && j->K % UNIT == 0;
}

/* x NULL: W to j->out, else y. `set`: one of those this machine has. */
static void start(job *j, const void *x, const void *table, int vector_size, int threads, gomp_parallel parallel, int set)
{
#define USE(SET) j->block = x ? linear_##SET : dequantize_##SET; if (x) strips_##SET(j, x)
    prepare(j, table, vector_size);
    switch (set) {
#if defined(__x86_64__)
    case WIDE:
        if (vector_size == 1) { prepare_avx512(j); USE(avx512); break; }
        /* fall through */
    case REGISTERS: prepare_avx2(j); USE(avx2); break;
#elif defined(__aarch64__)
    case REGISTERS: prepare_neon(j); USE(neon); break;
#endif
    default: j->planes = 0; USE(portable);
    }
    run(j, threads, parallel);
}

/* Whether 16-bit matmuls have instructions of their own (AVX512_BF16, and with it AMX): PyTorch's dense matmul uses them. */
int flute_cpu_multiplies_bfloat16(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") != 0;
#else
    return 0;
#endif
}

int flute_cpu_version(void) { return 3; }

/* strips: room for M * ceil(K / 256) * 256 floats. */
void flute_cpu_linear(void *y, const void *x, float *strips, const uint8_t *weight, const void *scales, const void *table,
                      const void *bias, int64_t M, int64_t N, int64_t K, int64_t group, int bits, int vector_size,
                      int dtype, int threads, gomp_parallel parallel, int set)
{
    job j = {.weight = weight, .scales = scales, .x = strips, .bias = bias, .out = y, .M = M, .N = N, .K = K,
             .group = group, .bits = bits, .dtype = dtype};
    start(&j, x, table, vector_size, threads, parallel, set);
}

void flute_cpu_dequantize(void *w, const uint8_t *weight, const void *scales, const void *table, int64_t N, int64_t K,
                          int64_t group, int bits, int vector_size, int dtype, int threads, gomp_parallel parallel, int set)
{
    job j = {.weight = weight, .scales = scales, .out = w, .N = N, .K = K, .group = group, .bits = bits, .dtype = dtype};
    start(&j, NULL, table, vector_size, threads, parallel, set);
}
