// One tile of a matrix product in bfloat16 with float32 sums: the inner loop of linear layers and attention.
//
// The right-hand side is packed in blocks of TILE_COLS columns: [depth / 2][TILE_COLS][2], so that one vector
// holds two consecutive values of 16 columns, which is what AVX512-BF16's dot product takes. No sums across a
// vector are needed, and a block is one stream from memory.

#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define TILE_COLS 32
#define TILE_ROWS 12  // 2 x 12 sums, 2 vectors of the right-hand side and a broadcast fit in 32 registers

typedef uint16_t bf16;

static inline __m512 widen(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

static inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

static inline __m512 load_bf16(const bf16 *x) { return widen(_mm256_loadu_si256((const __m256i *)x)); }

static inline void store_bf16(bf16 *x, __m512 value) { _mm256_storeu_si256((__m256i *)x, narrow(value)); }

// sums[rows][TILE_COLS] += a[rows][depth] * b, `rows` being a constant where this is inlined.
static inline __attribute__((always_inline)) void tile_of(
    const int rows, const bf16 *a, long a_stride, const bf16 *b, long depth, float *sums) {
    __m512 low[rows], high[rows];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
        low[i] = _mm512_load_ps(sums + i * TILE_COLS);
        high[i] = _mm512_load_ps(sums + i * TILE_COLS + 16);
    }
    for (long k = 0; k < depth; k += 2) {
        const __m512bh b_low = (__m512bh)_mm512_loadu_si512(b + k * TILE_COLS);
        const __m512bh b_high = (__m512bh)_mm512_loadu_si512(b + k * TILE_COLS + 32);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            int32_t pair;
            memcpy(&pair, a + i * a_stride + k, sizeof pair);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            low[i] = _mm512_dpbf16_ps(low[i], both, b_low);
            high[i] = _mm512_dpbf16_ps(high[i], both, b_high);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
        _mm512_store_ps(sums + i * TILE_COLS, low[i]);
        _mm512_store_ps(sums + i * TILE_COLS + 16, high[i]);
    }
}

// The same for 1 <= rows <= TILE_ROWS known at run time. `depth` is even; `sums` is aligned to 64 bytes.
static inline void multiply_tile(
    int rows, const bf16 *a, long a_stride, const bf16 *b, long depth, float *sums) {
    switch (rows) {
#define CASE(n) case n: tile_of(n, a, a_stride, b, depth, sums); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
    }
}

static inline int tile_rows_for(long rows) {  // equal tiles: 16 rows are 8 + 8, not 12 + 4
    const long tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    return (int)((rows + tiles - 1) / tiles);
}

// exp(x) for x <= 0, to about 2 ulp: 2^n * e^r with a polynomial in r. About 1e-38 below -87; NaN stays NaN.
static inline __m512 exp512(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}
