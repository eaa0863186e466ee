// Products of a few rows with one or two blocks of float32, bfloat16 or float16, in float32.
//
// `rows`, `blocks` and `format` are constants where this is inlined: the sums stay in registers. Sums of a column are
// made in the order of the inputs, whatever the tile, so a row's bits do not depend on its neighbours.

#pragma once

#include "packed.h"

// Rows of a tile of one block, and of two.
#if WIDTH == 16
#define FLOAT_ROWS 12  // of 32 registers
#define FLOAT_ROWS_OF_TWO 12
#else
#define FLOAT_ROWS 6  // AVX2: 12 sums, 2 weights and a broadcast in 16 registers
#define FLOAT_ROWS_OF_TWO 3
#endif

typedef struct {
    vf of[FLOAT_ROWS][2 * VECTORS];
} FloatSums;

INLINE void add_input(
    const int rows, const int vectors, const float *x, int64_t x_stride, const vf *w, FloatSums *sums) {
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        const vf value = vf_splat(x[r * x_stride]);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) sums->of[r][v] = vf_fma(value, w[v], sums->of[r][v]);
    }
}

// sums[block][row][16] += x[row][begin, end) * block. `w` are the blocks' inputs from `begin`.
INLINE void float_tile(
    const int format, const int rows, const int blocks, const float *x, int64_t x_stride, const char *const w[2],
    int64_t inputs, float *const out[2]) {
    const int vectors = blocks * VECTORS;
    FloatSums sums;
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            sums.of[r][v] = vf_load(out[v / VECTORS] + r * BLOCK_COLS + v % VECTORS * WIDTH);
        }
    for (int64_t k = 0; k < inputs; k += format == BF16 ? 2 : 1) {
        vf even[2 * VECTORS], odd[2 * VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            const char *block = w[v / VECTORS];
            const int64_t at = k * BLOCK_COLS + v % VECTORS * WIDTH;
            if (format == F32) even[v] = vf_load((const float *)block + at);
            if (format == F16) even[v] = vf_load_f16((const f16 *)block + at);
            if (format == BF16) {  // pairs of inputs
                const vi pairs = vi_load((const bf16 *)block + at + v % VECTORS * WIDTH);
                even[v] = (vf)(pairs << 16);
                odd[v] = (vf)(pairs & vi_splat((int32_t)0xffff0000));
            }
        }
        add_input(rows, vectors, x + k, x_stride, even, &sums);
        if (format == BF16) add_input(rows, vectors, x + k + 1, x_stride, odd, &sums);
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            vf_store(out[v / VECTORS] + r * BLOCK_COLS + v % VECTORS * WIDTH, sums.of[r][v]);
        }
}
