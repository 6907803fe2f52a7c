/* What one thread does with a block of rows, written once and compiled once per instruction set: _cpu.c includes this file
 * after defining
 *
 *   TARGET      the attribute that turns the instruction set on
 *   NAME(f)     f with the set's suffix
 *   LANES       floats per vector
 *   FORMATS(F)  the cases of a switch over 10 * bits + planes, each `case 42: F(4, 2); break;`
 *   lookup      what stays in registers; NAME(load)(job) makes it, NAME(unit)(t, q, f, bits, planes) decodes 32 weights
 *
 * Every sum y[m,n] is made by one thread in LANES lanes, in ascending k, segment by segment (a segment is what one group and
 * one strip share): sum += scale * (sum of products); for many tokens the weights are scaled instead, and a segment is a
 * strip. `dot` and `tile` are two ways to the same bits.
 */
typedef float NAME(vf) __attribute__((vector_size(4 * LANES)));
typedef float NAME(vu) __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* the same at any address */
#define vf NAME(vf)
#define vu NAME(vu)

/* `units` units at p -> w; `left` bytes of the row remain at p, at its end maybe fewer than the 16 that `unit` reads. */
TARGET INLINE void NAME(decode_as)(const job *j, const uint8_t *p, int64_t left, int units, float *w, const int bits,
                                   const int planes)
{
    const lookup t = NAME(load)(j);
    uint8_t copy[16];
    for (int u = 0; u < units; u++, p += 4 * bits, left -= 4 * bits, w += UNIT) {
        const uint8_t *q = p;
        vf f[UNIT / LANES];
        if (left < 16) q = memcpy(memset(copy, 0, 16), p, (size_t)left);
        NAME(unit)(&t, q, f, bits, planes);
        for (int i = 0; i < UNIT / LANES; i++) *(vu *)(w + LANES * i) = f[i];
    }
    __builtin_prefetch(p + ROWS * j->row_bytes);
}

TARGET APART static void NAME(decode)(const job *j, const uint8_t *p, int64_t left, int units, float *w)
{
#define DECODE(BITS, PLANES) NAME(decode_as)(j, p, left, units, w, BITS, PLANES)
    switch (10 * j->bits + j->planes) { FORMATS(DECODE) }
#undef DECODE
}

/* Groups g, g+1 ... of DOT_ROWS rows, as many as there are and fit: their scales, converted in vectors. */
TARGET INLINE void NAME(scales)(const job *j, int64_t n, int64_t g, float (*scale)[SCALES])
{
    const int count = (int)(j->groups - g < SCALES ? j->groups - g : SCALES);
    for (int r = 0; r < DOT_ROWS; r++) numbers(j->scales, (n + r) * j->groups + g, count, j->dtype, scale[r]);
}

/* sum[r] = row n+r . x for DOT_ROWS rows and one token, without a stop in L1. Whole units only; and a unit of fewer than 16
 * bytes is read on into the next row, which must exist. */
TARGET INLINE void NAME(dot_as)(const job *j, int64_t n, vf *sum, const int bits, const int planes)
{
    const lookup t = NAME(load)(j);
    const int64_t row = j->row_bytes;
    const uint8_t *p = j->weight + n * row;
    const uint8_t *ahead = p + DOT_ROWS * row; /* hardware follows a row, but not to the next one */
    const float *x = j->x;
    float scale[DOT_ROWS][SCALES];
    for (int r = 0; r < DOT_ROWS; r++) sum[r] = (vf){0};
    for (int64_t k = 0, g = 0; k < j->K; g++) {
        const int64_t group_end = j->group < j->K - k ? k + j->group : j->K;
        if (g % SCALES == 0) NAME(scales)(j, n, g, scale);
        const float *s = scale[0] + g % SCALES;
        while (k < group_end) {
            const int64_t end = segment_end(k, group_end);
            vf a[DOT_ROWS] = {{0}};
            UNROLL for (int r = 0; r < DOT_ROWS; r++) __builtin_prefetch(ahead + r * row);
            for (; k < end; k += UNIT, p += 4 * bits, ahead += 4 * bits, x += UNIT)
                UNROLL for (int r = 0; r < DOT_ROWS; r++) {
                    vf f[UNIT / LANES];
                    NAME(unit)(&t, p + r * row, f, bits, planes);
                    UNROLL for (int i = 0; i < UNIT / LANES; i++) a[r] += f[i] * *(const vu *)(x + LANES * i);
                }
            UNROLL for (int r = 0; r < DOT_ROWS; r++) sum[r] += a[r] * s[r * SCALES];
        }
    }
}

TARGET APART static void NAME(dot)(const job *j, int64_t n, vf *sum)
{
#define DOT(BITS, PLANES) NAME(dot_as)(j, n, sum, BITS, PLANES)
    switch (10 * j->bits + j->planes) { FORMATS(DOT) }
#undef DOT
}

/* One strip of row n as float32: table values of weights k0 .. k0+len, times their scales if asked, then zeros up to a whole
 * unit. */
TARGET INLINE void NAME(strip)(const job *j, int64_t n, int64_t k0, int len, int scaled, float *w)
{
    const int units = (len + UNIT - 1) / UNIT;
    const int64_t at = k0 / 8 * j->bits;
    NAME(decode)(j, j->weight + n * j->row_bytes + at, j->row_bytes - at, units, w);
    for (int64_t k = 0, g = k0 / j->group; scaled && k < len; g++) {
        const int64_t end = j->group < j->K ? (g + 1) * j->group - k0 : len;
        const float s = number(j->scales, n * j->groups + g, j->dtype);
        for (; k < end && k < len; k++) w[k] *= s;
    }
    if (len % UNIT) memset(w + len, 0, sizeof(float) * (size_t)(units * UNIT - len));
}

/* For R rows and T tokens: sum[t][r] += scale[s][r] * (w[r] . x[t]) for each segment s of the strip; ends[s], whole units. */
TARGET INLINE void NAME(tile)(const float *w, const float *x, const float (*scale)[ROWS], const int *ends, int segments,
                              vf (*sum)[ROWS], const int R, const int T)
{
    for (int s = 0, k = 0; s < segments; s++) {
        vf a[6][4] = {{{0}}};
        for (const int end = ends[s]; k < end; k += LANES)
            UNROLL for (int r = 0; r < R; r++) {
                const vf wr = *(const vu *)(w + r * STRIP + k);
                UNROLL for (int t = 0; t < T; t++) a[r][t] += wr * *(const vu *)(x + t * STRIP + k);
            }
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int t = 0; t < T; t++) sum[t][r] += a[r][t] * scale[s][r];
    }
}

/* All rows and `tokens` tokens, at least 1, of which it takes up to 4. */
TARGET APART static void NAME(tiles)(const float *w, const float *x, const float (*scale)[ROWS], const int *ends, int segments,
                                     vf (*sum)[ROWS], int tokens)
{
#define TILES(R, T)                                                                                                    \
    for (int r = 0; r < ROWS; r += R)                                                                                  \
        NAME(tile)(w + r * STRIP, x, (const float(*)[ROWS])(scale[0] + r), ends, segments, (vf(*)[ROWS])(sum[0] + r), R, T)
    if (tokens == 1) TILES(6, 1);
    else if (tokens == 2) TILES(6, 2);
    else if (tokens == 3) TILES(3, 3);
    else TILES(3, 4);
#undef TILES
}

TARGET INLINE void NAME(finish)(const job *j, int64_t m, int64_t n, const vf *sum)
{
    vf s = *sum;
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) s[i] += s[i + half];
    store(j, m * j->N + n, j->bias ? s[0] + number(j->bias, n, j->dtype) : s[0]);
}

/* y[m0 .. m0+tokens, n0 .. n0+rows]: a strip of the rows is decoded to L1, then meets the tokens, four at a time. */
TARGET INLINE void NAME(multiply)(const job *j, int64_t n0, int rows, int64_t m0, int tokens)
{
    float w[ROWS * STRIP] __attribute__((aligned(64))), scale[STRIP / UNIT][ROWS];
    vf sum[TOKENS][ROWS]; /* what a tile adds to lies together */
    int ends[STRIP / UNIT];
    if (rows < ROWS) memset(w, 0, sizeof w); /* rows beyond N are multiplied too, so they must hold something */
    memset(sum, 0, sizeof sum[0] * (size_t)tokens);
    for (int64_t k0 = 0; k0 < j->K; k0 += STRIP) {
        const int len = j->K - k0 < STRIP ? (int)(j->K - k0) : STRIP;
        int segments = 0;
        for (int r = 0; r < rows; r++) NAME(strip)(j, n0 + r, k0, len, !j->scale_sums, w + r * STRIP);
        for (int64_t k = k0, g = k0 / j->group; k < k0 + len; g++, segments++) {
            for (int r = 0; r < ROWS; r++) scale[segments][r] = 1.0f;
            if (j->scale_sums) scales_of(j, n0, rows, g, scale[segments]);
            k = segment_end(k, j->scale_sums && j->group < j->K - g * j->group ? (g + 1) * j->group : j->K);
            ends[segments] = (int)(k - k0 + UNIT - 1) / UNIT * UNIT;
        }
        for (int t = 0; t < tokens; t += 4) {
            const float *x = j->x + k0 * j->M + (m0 + t) * STRIP;
            NAME(tiles)(w, x, scale, ends, segments, sum + t, tokens - t);
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) NAME(finish)(j, m0 + t, n0 + r, sum[t] + r);
}

TARGET static void NAME(linear)(const job *j, int64_t block)
{
    const int64_t n0 = block * ROWS;
    if (j->dot && n0 + ROWS <= j->N - (j->bits < 4)) {
        vf sum[DOT_ROWS];
        for (int64_t n = n0; n < n0 + ROWS; n += DOT_ROWS) {
            NAME(dot)(j, n, sum);
            for (int r = 0; r < DOT_ROWS; r++) NAME(finish)(j, 0, n + r, sum + r);
        }
        return;
    }
    for (int64_t m0 = 0; m0 < j->M; m0 += TOKENS)
        NAME(multiply)(j, n0, j->N - n0 < ROWS ? (int)(j->N - n0) : ROWS, m0, j->M - m0 < TOKENS ? (int)(j->M - m0) : TOKENS);
}

/* W needs every product table * scale on its own, rounded to float32 and then to the dtype. */
TARGET static void NAME(dequantize)(const job *j, int64_t block)
{
    float w[STRIP] __attribute__((aligned(64)));
    for (int64_t k0 = 0; k0 < j->K; k0 += STRIP) {
        const int len = j->K - k0 < STRIP ? (int)(j->K - k0) : STRIP;
        for (int64_t n = block * ROWS; n < j->N && n < (block + 1) * ROWS; n++) {
            const int64_t at = n * j->K + k0;
            NAME(strip)(j, n, k0, len, 1, w);
            if (j->dtype == FLOAT32) memcpy((float *)j->out + at, w, sizeof(float) * (size_t)len);
            uint16_t *out = (uint16_t *)j->out + at;
            if (j->dtype == FLOAT16) for (int k = 0; k < len; k++) out[k] = to_half(w[k]);
            if (j->dtype == BFLOAT16) for (int k = 0; k < len; k++) out[k] = to_bfloat(w[k]);
        }
    }
}

/* x (M, K) -> strips (ceil(K/256), M, 256) of float32, zero beyond K: what a strip of weights meets lies together. */
TARGET static void NAME(strips)(const job *j, const void *x)
{
    float *to = j->x;
    for (int64_t k0 = 0; k0 < j->K; k0 += STRIP)
        for (int64_t m = 0; m < j->M; m++, to += STRIP) {
            const int len = j->K - k0 < STRIP ? (int)(j->K - k0) : STRIP;
            numbers(x, m * j->K + k0, len, j->dtype, to);
            memset(to + len, 0, sizeof(float) * (size_t)(STRIP - len));
        }
}

#undef vf
#undef vu
#undef lookup
#undef TARGET
#undef NAME
#undef LANES
#undef FORMATS
