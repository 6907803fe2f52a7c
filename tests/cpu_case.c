/* Runs the CPU kernel on one problem, for machines that have a compiler or an emulator but no Python:
 *   cpu_case SET THREADS < problem > result
 * problem: int64 M N K group bits vector_size dtype, then the bytes of x, weight, scales, table and bias, each after its
 * length as int64 (bias may be empty). result: y (M, N), then W (N, K). */
#include <stdio.h>
#include <stdlib.h>

#include "_cpu.c"

static void *take(int64_t *bytes)
{
    if (fread(bytes, 8, 1, stdin) != 1) exit(1);
    void *p = malloc((size_t)*bytes + 1);
    if (!p || fread(p, 1, (size_t)*bytes, stdin) != (size_t)*bytes) exit(1);
    return p;
}

int main(int count, char **argument)
{
    int64_t of[7], bytes;
    if (count != 3 || fread(of, 8, 7, stdin) != 7) return 1;
    const int set = atoi(argument[1]), threads = atoi(argument[2]);
    const int64_t M = of[0], N = of[1], K = of[2], size = of[6] == FLOAT32 ? 4 : 2;
    if (set > flute_cpu_best()) return 2;
    void *x = take(&bytes), *weight = take(&bytes), *scales = take(&bytes), *table = take(&bytes), *bias = take(&bytes);
    float *strips = malloc(sizeof(float) * (size_t)(M * ((K + STRIP - 1) / STRIP * STRIP)));
    void *y = malloc((size_t)(M * N * size)), *w = malloc((size_t)(N * K * size));
    if (!strips || !y || !w) return 1;
    flute_cpu_linear(y, x, strips, weight, scales, table, bytes ? bias : NULL, M, N, K, of[3], (int)of[4], (int)of[5],
                     (int)of[6], threads, NULL, set);
    flute_cpu_dequantize(w, weight, scales, table, N, K, of[3], (int)of[4], (int)of[5], (int)of[6], threads, NULL, set);
    fwrite(y, (size_t)size, (size_t)(M * N), stdout);
    fwrite(w, (size_t)size, (size_t)(N * K), stdout);
    return 0;
}
