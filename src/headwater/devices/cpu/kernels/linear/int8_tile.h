// Products of a few rows of int16 activations with one or two blocks of Q8_0: exact sums over a group of 32.

#pragma once

#include "packed.h"

// Rows of a tile of one block, and of two.
#if WIDTH == 16
#define INT8_ROWS 12
#define INT8_ROWS_OF_TWO 6
#else
#define INT8_ROWS 6
#define INT8_ROWS_OF_TWO 2
#endif

// sums[block][row][16] += x[row] * block, over `groups` of 32 inputs. `x_stride` counts groups. Weights `ahead` bytes
// behind those in use are prefetched.
INLINE void int8_tile(
    const int rows, const int blocks, const Group16 *x, int64_t x_stride, const char *const w[2], int64_t groups,
    int64_t ahead, float *const out[2]) {
    const int vectors = blocks * VECTORS;
    vf sums[INT8_ROWS][2 * VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) sums[r][v] = vf_load(out[v / VECTORS] + r * BLOCK_COLS + v % VECTORS * WIDTH);
    for (int64_t g = 0; g < groups; g++) {
        vi dots[INT8_ROWS][2 * VECTORS];
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) dots[r][v] = vi_splat(0);
        const int64_t at = g * group_bytes(Q8_0);
        for (int b = 0; b < blocks; b++) prefetch(w[b] + at + ahead, group_bytes(Q8_0));
#pragma GCC unroll 2
        for (int k = 0; k < GROUP; k += 2) {
            vi pairs[2 * VECTORS];
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) {
                const char *group = w[v / VECTORS] + at;
                pairs[v] = vi_load_s8_pairs((const int8_t *)group + k * BLOCK_COLS + v % VECTORS * WIDTH * 2);
            }
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                const vi values = vi_splat_bytes(x[r * x_stride + g].values + k);
#pragma GCC unroll 8
                for (int v = 0; v < vectors; v++) dots[r][v] = dot2(dots[r][v], pairs[v], values);
            }
        }
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            const char *scales = w[v / VECTORS] + at + GROUP * BLOCK_COLS;
            const vf scale = vf_load_f16((const f16 *)scales + v % VECTORS * WIDTH);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                sums[r][v] = vf_fma(vf_from_int(dots[r][v]), vf_splat(x[r * x_stride + g].scale) * scale, sums[r][v]);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) vf_store(out[v / VECTORS] + r * BLOCK_COLS + v % VECTORS * WIDTH, sums[r][v]);
}
