// Products of a few rows with one or two blocks of float32, bfloat16 or float16, in float32.
//
// `rows`, `blocks` and `format` are constants where this is inlined: the sums stay in registers. Sums of a column are
// made in the order of the inputs, whatever the tile, so a row's bits do not depend on its neighbours.

#pragma once

#include "packed.h"

// Rows of a tile of one block, and of two.
#if WIDTH == 16
#define FLOAT_ROWS 12  // of 32 registers
#define BF16_ROWS 12
#define FLOAT_ROWS_OF_TWO 12
#else
#define FLOAT_ROWS 6  // AVX2: 12 sums, 2 weights and a broadcast in 16 registers
#define BF16_ROWS 5  // one register more is needed for the mask
#if WIDTH == 8
#define FLOAT_ROWS_OF_TWO 2  // 8 sums and 4 weights; three rows of one block take two thirds of the time of two
#else
#define FLOAT_ROWS_OF_TWO 3
#endif
#endif

typedef struct {
    vf of[FLOAT_ROWS][2 * VECTORS];
} FloatSums;

// Input k + i of the outputs of one vector.
INLINE vf load_weights(const int format, const char *block, int64_t k, const int i, const int part) {
    const int64_t at = k * BLOCK_COLS + part * WIDTH;
    if (format == F32) return vf_load((const float *)block + at);
    if (format == F16) return vf_load_f16((const f16 *)block + at);
    const vi pairs = vi_load((const bf16 *)block + at + part * WIDTH);
    return (vf)(i == 0 ? pairs << 16 : pairs & vi_splat((int32_t)0xffff0000));
}

// Input k + i of all rows.
INLINE void add_input(
    const int format, const int rows, const int vectors, const float *x, int64_t x_stride, const char *const w[2],
    int64_t k, const int i, FloatSums *sums) {
    vf weights[2 * VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) weights[v] = load_weights(format, w[v / VECTORS], k, i, v % VECTORS);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        const vf value = vf_splat(x[k + i + r * x_stride]);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) sums->of[r][v] = vf_fma(value, weights[v], sums->of[r][v]);
    }
}

// sums[block][row][16] += x[row] * block, over `inputs`. Weights `ahead` bytes behind those in use are prefetched.
INLINE void float_tile(
    const int format, const int rows, const int blocks, const float *x, int64_t x_stride, const char *const w[2],
    int64_t inputs, int64_t ahead, float *const out[2]) {
    const int vectors = blocks * VECTORS;
    FloatSums sums;
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            sums.of[r][v] = vf_load(out[v / VECTORS] + r * BLOCK_COLS + v % VECTORS * WIDTH);
        }
    const int pairs = format == BF16 ? 2 : 1;  // inputs that lie side by side
    for (int64_t k = 0; k < inputs; k += pairs) {
        const int64_t at = k * BLOCK_COLS * (format == F32 ? 4 : 2);
        for (int b = 0; b < blocks; b++) __builtin_prefetch(w[b] + at + ahead);
        // Written out: a loop over the two made code of gcc 13 fifty times slower than that of gcc 12.
        add_input(format, rows, vectors, x, x_stride, w, k, 0, &sums);
        if (pairs == 2) add_input(format, rows, vectors, x, x_stride, w, k, 1, &sums);
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            vf_store(out[v / VECTORS] + r * BLOCK_COLS + v % VECTORS * WIDTH, sums.of[r][v]);
        }
}
