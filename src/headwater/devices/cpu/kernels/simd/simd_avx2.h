// AVX2, FMA and F16C; with AVX-VNNI where the compiler is told to use it. Included by simd.h only.

#pragma once

#include <immintrin.h>

INLINE vf vf_splat(float x) { return (vf)_mm256_set1_ps(x); }
INLINE vi vi_splat(int32_t x) { return (vi)_mm256_set1_epi32(x); }
INLINE vf vf_fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE vf vf_min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE vf vf_max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vf vf_sqrt(vf a) { return (vf)_mm256_sqrt_ps((__m256)a); }

INLINE __m256i first_lanes(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

INLINE vf vf_load_n(const float *from, int64_t n) { return (vf)_mm256_maskload_ps(from, first_lanes(n)); }

INLINE void vf_store_n(float *to, vf x, int64_t n) {
    if (n == WIDTH) _mm256_storeu_ps(to, (__m256)x);
    else _mm256_maskstore_ps(to, first_lanes(n), (__m256)x);  // dozens of operations on AMD
}

INLINE vf vf_load_f16(const f16 *from) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)); }

INLINE void vf_store_f16(f16 *to, vf x) {
    _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}

INLINE float vf_sum(vf x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

INLINE float vf_max_of(vf x) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

INLINE vi vi_round(vf x) { return (vi)_mm256_cvtps_epi32((__m256)x); }  // to nearest, ties to even
INLINE vf vf_from_int(vi x) { return (vf)_mm256_cvtepi32_ps((__m256i)x); }

INLINE vi vi_load_u8(const uint8_t *from) { return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from)); }
INLINE vi vi_load_s8(const int8_t *from) { return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)); }

INLINE vi vi_load_u16(const uint16_t *from) {
    return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
}

INLINE void vi_store_16(uint16_t *to, vi x) {  // the lower halves; the upper ones are zero
    const __m256i pairs = _mm256_packus_epi32((__m256i)x, (__m256i)x);
    _mm_storeu_si128((__m128i *)to, _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08)));
}

INLINE void vi_store_8(int8_t *to, vi x) {  // from -128 to 127
    const __m256i words = _mm256_packs_epi32((__m256i)x, (__m256i)x), bytes = _mm256_packs_epi16(words, words);
    const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
    _mm_storel_epi64((__m128i *)to, _mm_unpacklo_epi32(low, high));
}

// Sums of products of four uint8 and four int8 in a lane. Without VNNI they are two sums of 16 bits each: up to
// DOT4_MAX_SUM of uint8 values, times 127, may be added up before dots_sum widens them.
typedef vi dots;

INLINE dots dots_zero(void) { return (vi){0}; }

#if defined(__AVXVNNI__)
#define DOT4_MAX_SUM (1 << 20)
INLINE dots dot4(dots sum, vi u8, vi s8) {
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)u8, (__m256i)s8);
}
INLINE vi dots_sum(dots sum) { return sum; }
INLINE vi dot2(vi sum, vi a, vi b) { return (vi)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b); }
#else
#define DOT4_MAX_SUM 258  // 258 * 127 < 2^15
INLINE dots dot4(dots sum, vi u8, vi s8) {
    return (vi)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16((__m256i)u8, (__m256i)s8));
}
INLINE vi dots_sum(dots sum) { return (vi)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1)); }
INLINE vi dot2(vi sum, vi a, vi b) { return sum + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#endif

// The number of a table for each byte, which is below 16.
INLINE vi vi_look_up(const uint8_t table[16], vi index) {
    const __m256i numbers = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    return (vi)_mm256_shuffle_epi8(numbers, (__m256i)index);
}

// Pairs of int8 as pairs of int16: one lane holds two.
INLINE vi vi_load_s8_pairs(const int8_t *from) {
    return (vi)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from));
}

// COLUMNS columns of WIDTH rows of 32-bit numbers: those from `byte` of each row on.
enum { COLUMNS = 4 };

INLINE void vf_load_columns(const uint8_t *const rows[WIDTH], int64_t byte, vf x[COLUMNS]) {
    __m256 y[4], z[4];
    for (int i = 0; i < 4; i++) {
        const __m128 low = _mm_loadu_ps((const float *)(rows[i] + byte)), high = _mm_loadu_ps((const float *)(rows[i + 4] + byte));
        y[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
    }
    for (int i = 0; i < 4; i += 2) {
        z[i] = _mm256_unpacklo_ps(y[i], y[i + 1]);
        z[i + 1] = _mm256_unpackhi_ps(y[i], y[i + 1]);
    }
    x[0] = (vf)_mm256_shuffle_ps(z[0], z[2], 0x44);
    x[1] = (vf)_mm256_shuffle_ps(z[0], z[2], 0xee);
    x[2] = (vf)_mm256_shuffle_ps(z[1], z[3], 0x44);
    x[3] = (vf)_mm256_shuffle_ps(z[1], z[3], 0xee);
}

// rows[i][j] -> columns[j][i], in place.
INLINE void vf_transpose(vf x[WIDTH]) {
    __m256 y[8], z[8];
    for (int i = 0; i < 8; i += 2) {
        y[i] = _mm256_unpacklo_ps((__m256)x[i], (__m256)x[i + 1]);
        y[i + 1] = _mm256_unpackhi_ps((__m256)x[i], (__m256)x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        z[i] = _mm256_shuffle_ps(y[i], y[i + 2], 0x44);
        z[i + 1] = _mm256_shuffle_ps(y[i], y[i + 2], 0xee);
        z[i + 2] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0x44);
        z[i + 3] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        x[i] = (vf)_mm256_permute2f128_ps(z[i], z[i + 4], 0x20);
        x[i + 4] = (vf)_mm256_permute2f128_ps(z[i], z[i + 4], 0x31);
    }
}
