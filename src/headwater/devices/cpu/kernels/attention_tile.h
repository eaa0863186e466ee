// The two products of attention, in float32: a few stacked queries times a packed block.
//
// The right-hand side is packed in panels of PANEL columns, [depth][PANEL], so that sums run down the columns. Every sum
// is one chain of fused multiply-adds in the order of `depth`, whatever the tile: bits do not depend on how many
// queries are stacked.

#pragma once

#include "simd.h"

#if WIDTH == 8
#define TILE_ROWS 6  // 2 x 6 sums, 2 vectors of the right-hand side and a broadcast fit in 16 registers
#else
#define TILE_ROWS 12  // in 32 registers
#endif
#define PANEL (2 * WIDTH)
#define LOG2_E 1.44269504f  // scores are exponents of 2

// out[rows][PANEL * panels] (+)= a[rows][depth] * b. `rows`, `panels` and `is_first` are constants where this is inlined.
INLINE void tile_of(const int rows, const int panels, const float *a, int64_t a_stride, const float *b,
                    int64_t b_stride, int64_t depth, float *out, int64_t out_stride, int is_first) {
    vf sums[TILE_ROWS][4];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < 2 * panels; j++) sums[i][j] = is_first ? vf_zero() : vf_load(out + i * out_stride + j * WIDTH);
    }
    for (int64_t k = 0; k < depth; k++) {
        vf right[4];
#pragma GCC unroll 4
        for (int j = 0; j < 2 * panels; j++) right[j] = vf_load(b + j / 2 * b_stride + k * PANEL + j % 2 * WIDTH);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            const vf left = vf_splat(a[i * a_stride + k]);
#pragma GCC unroll 4
            for (int j = 0; j < 2 * panels; j++) sums[i][j] = vf_fma(left, right[j], sums[i][j]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < 2 * panels; j++) vf_store(out + i * out_stride + j * WIDTH, sums[i][j]);
    }
}

// The same for 1 <= rows <= TILE_ROWS and any number of panels, b_stride floats apart. Few rows take two panels at once:
// a sum waits for the one before, so there must be enough of them.
static inline void multiply_tile(int rows, int64_t panels, const float *a, int64_t a_stride, const float *b,
                                 int64_t b_stride, int64_t depth, float *out, int64_t out_stride, int is_first) {
    int64_t panel = 0;
#define AT a, a_stride, b + panel * b_stride, b_stride, depth, out + panel * PANEL, out_stride, is_first
#define TWO(n) case n: for (; panel + 2 <= panels; panel += 2) tile_of(n, 2, AT); break;
#define ONE(n) case n: for (; panel < panels; panel++) tile_of(n, 1, AT); break;
    switch (rows) {
        TWO(1) TWO(2) TWO(3)
#if TILE_ROWS == 12
        TWO(4) TWO(5) TWO(6)
#endif
    }
    switch (rows) {
        ONE(1) ONE(2) ONE(3) ONE(4) ONE(5) ONE(6)
#if TILE_ROWS == 12
        ONE(7) ONE(8) ONE(9) ONE(10) ONE(11) ONE(12)
#endif
    }
#undef ONE
#undef TWO
#undef AT
}

INLINE int tile_rows_for(int64_t rows) {  // equal tiles: 8 rows are 4 + 4, not 6 + 2
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    return (int)((rows + tiles - 1) / tiles);
}

// 2^x for x <= 0, to about 2 ulp: 2^n * 2^r with a polynomial in r. About 1e-38 below -126; NaN stays NaN.
#if WIDTH == 16
INLINE vf vf_exp2(vf x) {
    x = vf_max(vf_splat(-126.0f), x);
    const vf r = vf_above_floor(x);
    vf p = vf_splat(2.1612919226754457e-4f);
    p = vf_fma(p, r, vf_splat(1.2467845808714628e-3f));
    p = vf_fma(p, r, vf_splat(9.675451554358006e-3f));
    p = vf_fma(p, r, vf_splat(5.5485282093286514e-2f));
    p = vf_fma(p, r, vf_splat(2.402293086051941e-1f));
    p = vf_fma(p, r, vf_splat(6.931470632553101e-1f));
    p = vf_fma(p, r, vf_splat(1.0f));
    return vf_times_2_to_floor(p, x);
}
#else
INLINE vf vf_exp2(vf x) {
    x = vf_max(vf_splat(-126.0f), x);
    const vi whole = vi_round(x);
    const vf r = x - vf_from_int(whole);
    vf p = vf_splat(1.535336188319500e-4f);  // Cephes' exp2f
    p = vf_fma(p, r, vf_splat(1.339887440266574e-3f));
    p = vf_fma(p, r, vf_splat(9.618437357674640e-3f));
    p = vf_fma(p, r, vf_splat(5.550332471162809e-2f));
    p = vf_fma(p, r, vf_splat(2.402264791363012e-1f));
    p = vf_fma(p, r, vf_splat(6.931472028550421e-1f));
    p = vf_fma(p, r, vf_splat(1.0f));
    return p * (vf)(vi)((vu)(whole + vi_splat(127)) << 23);
}
#endif

// What weighted sums are multiplied by in the end, given their largest score and total weight. A sink is one score more,
// without a value. Scores are powers of two; NaN stays NaN.
INLINE vf end_scale(vf largest, vf total, vf sink) {
    const vi is_above = (vi)(sink > largest);
    const vf most = (vf)(((vi)sink & is_above) | ((vi)largest & ~is_above));
    const vf keep = vf_exp2(largest - most);
    return keep / vf_fma(total, keep, vf_exp2(sink - most));
}

INLINE float largest_score(const float *scores, int64_t num) {
    const int64_t whole = num / WIDTH * WIDTH;
    vf largest = vf_splat(-INFINITY);
    for (int64_t i = 0; i < whole; i += WIDTH) largest = vf_max(largest, vf_load(scores + i));
    float most = vf_max_of(largest);
    for (int64_t i = whole; i < num; i++) most = scores[i] > most ? scores[i] : most;
    return most;
}
