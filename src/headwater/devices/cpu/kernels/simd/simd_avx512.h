// AVX512 (x86-64-v4); with VNNI where the compiler is told to use it. Included by simd.h only.

#pragma once

#include <immintrin.h>

INLINE vf vf_splat(float x) { return (vf)_mm512_set1_ps(x); }
INLINE vi vi_splat(int32_t x) { return (vi)_mm512_set1_epi32(x); }
INLINE vf vf_fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE vf vf_min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE vf vf_max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vf vf_sqrt(vf a) { return (vf)_mm512_sqrt_ps((__m512)a); }

INLINE __mmask16 first_lanes(int64_t n) { return (__mmask16)((1u << n) - 1); }

INLINE vf vf_load_n(const float *from, int64_t n) { return (vf)_mm512_maskz_loadu_ps(first_lanes(n), from); }
INLINE void vf_store_n(float *to, vf x, int64_t n) { _mm512_mask_storeu_ps(to, first_lanes(n), (__m512)x); }

INLINE vf vf_load_f16(const f16 *from) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }

INLINE void vf_store_f16(f16 *to, vf x) {
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}

INLINE __m256 lower_half(vf x) { return _mm512_castps512_ps256((__m512)x); }
INLINE __m256 upper_half(vf x) { return _mm512_extractf32x8_ps((__m512)x, 1); }

INLINE float vf_sum(vf x) {
    const __m256 h = _mm256_add_ps(lower_half(x), upper_half(x));
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

INLINE float vf_max_of(vf x) {
    const __m256 h = _mm256_max_ps(lower_half(x), upper_half(x));
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

INLINE vi vi_round(vf x) { return (vi)_mm512_cvtps_epi32((__m512)x); }  // to nearest, ties to even
INLINE vf vf_from_int(vi x) { return (vf)_mm512_cvtepi32_ps((__m512i)x); }

INLINE vf vf_above_floor(vf x) { return (vf)_mm512_reduce_ps((__m512)x, 0x09); }  // x - floor(x)
INLINE vf vf_times_2_to_floor(vf a, vf x) { return (vf)_mm512_scalef_ps((__m512)a, (__m512)x); }
INLINE vf vf_rough_inverse(vf x) { return (vf)_mm512_rcp14_ps((__m512)x); }  // to 14 bits

// 2^x to 13 bits, for x from -125 to 125. NaN stays NaN.
INLINE vf vf_rough_exp2(vf x) {
    const vf r = vf_above_floor(x);
    vf p = vf_splat(7.802451e-2f);
    p = vf_fma(p, r, vf_splat(2.2606717e-1f));
    p = vf_fma(p, r, vf_splat(6.9583354e-1f));
    p = vf_fma(p, r, vf_splat(9.9992522e-1f));
    return vf_times_2_to_floor(p, x);
}

INLINE vi vi_load_u8(const uint8_t *from) { return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from)); }
INLINE vi vi_load_s8(const int8_t *from) { return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)); }

INLINE vi vi_load_u16(const uint16_t *from) {
    return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
}

INLINE void vi_store_16(uint16_t *to, vi x) {  // the lower halves
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16((__m512i)x));
}

INLINE void vi_store_8(int8_t *to, vi x) {  // from -128 to 127
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8((__m512i)x));
}

// Sums of products of four uint8 and four int8 in a lane; simd_avx2.h has the reason for DOT4_MAX_SUM.
typedef vi dots;

INLINE dots dots_zero(void) { return (vi){0}; }

#if defined(__AVX512VNNI__)
#define DOT4_MAX_SUM (1 << 20)
INLINE dots dot4(dots sum, vi u8, vi s8) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u8, (__m512i)s8);
}
INLINE vi dots_sum(dots sum) { return sum; }
INLINE vi dot2(vi sum, vi a, vi b) { return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b); }
#else
#define DOT4_MAX_SUM 258  // 258 * 127 < 2^15
INLINE dots dot4(dots sum, vi u8, vi s8) {
    return (vi)_mm512_add_epi16((__m512i)sum, _mm512_maddubs_epi16((__m512i)u8, (__m512i)s8));
}
INLINE vi dots_sum(dots sum) { return (vi)_mm512_madd_epi16((__m512i)sum, _mm512_set1_epi16(1)); }
INLINE vi dot2(vi sum, vi a, vi b) { return sum + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
#endif

// The number of a table for each byte, which is below 16.
INLINE vi vi_look_up(const uint8_t table[16], vi index) {
    const __m512i numbers = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
    return (vi)_mm512_shuffle_epi8(numbers, (__m512i)index);
}

// Pairs of int8 as pairs of int16: one lane holds two.
INLINE vi vi_load_s8_pairs(const int8_t *from) {
    return (vi)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)from));
}

// rows[i][j] -> columns[j][i], in place.
INLINE void vf_transpose(vf x[WIDTH]) {
    __m512 y[16], z[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_ps((__m512)x[i], (__m512)x[i + 1]);
        y[i + 1] = _mm512_unpackhi_ps((__m512)x[i], (__m512)x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        z[i] = _mm512_shuffle_ps(y[i], y[i + 2], 0x44);
        z[i + 1] = _mm512_shuffle_ps(y[i], y[i + 2], 0xee);
        z[i + 2] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0x44);
        z[i + 3] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        y[i] = _mm512_shuffle_f32x4(z[i], z[i + 4], 0x88);
        y[i + 4] = _mm512_shuffle_f32x4(z[i + 8], z[i + 12], 0x88);
        y[i + 8] = _mm512_shuffle_f32x4(z[i], z[i + 4], 0xdd);
        y[i + 12] = _mm512_shuffle_f32x4(z[i + 8], z[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        x[i] = (vf)_mm512_shuffle_f32x4(y[i], y[i + 4], 0x88);
        x[i + 8] = (vf)_mm512_shuffle_f32x4(y[i], y[i + 4], 0xdd);
        x[i + 4] = (vf)_mm512_shuffle_f32x4(y[i + 8], y[i + 12], 0x88);
        x[i + 12] = (vf)_mm512_shuffle_f32x4(y[i + 8], y[i + 12], 0xdd);
    }
}

// COLUMNS columns of WIDTH rows of 32-bit numbers: those from `byte` of each row on.
enum { COLUMNS = WIDTH };

INLINE void vf_load_columns(const uint8_t *const rows[WIDTH], int64_t byte, vf x[COLUMNS]) {
    for (int i = 0; i < WIDTH; i++) x[i] = (vf)vi_load(rows[i] + byte);
    vf_transpose(x);
}
