// Activations of prompts' rows in bfloat16, as products in tiles take them: `quantize` writes them, or what makes the
// numbers writes them at once (fuse_activations of packed_layers.py).

#pragma once

#include "amx_weights.h"

#if HAS_AMX

INLINE void order_quads(bf16 *y, int num) {
    for (int quad = 0; quad < num; quad += 4) {
        const bf16 second = y[quad + 1];
        y[quad + 1] = y[quad + 2], y[quad + 2] = second;
    }
}

// A group of `inputs` numbers in the order of the weights (amx_weights.h), zeros behind them. Of bfloat16 and Q8_0 what
// the rounding left follows, rounded as well.
INLINE void round_group(const int format, const float *x, int64_t inputs, bf16 *y) {
#if defined(__AVX512BF16__)
    if (has_quads(format)) {  // whole groups
        const __m512 unit = (__m512)vf_splat(amx_unit(format));
        const __m512 low = (__m512)vf_load(x) * unit, high = (__m512)vf_load(x + WIDTH) * unit;
        const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
        _mm512_storeu_si512(y, _mm512_shuffle_epi8((__m512i)_mm512_cvtne2ps_pbh(high, low), order));
        return;
    }
#endif
    for (int i = 0; i < GROUP; i += WIDTH) {
        const int64_t left = inputs - i < 0 ? 0 : inputs - i < WIDTH ? inputs - i : WIDTH;
        const vf value = vf_load_n(x + i, left) * vf_splat(amx_unit(format));
        vf_store_bf16(y + i, value);
        if (format <= Q8_0) vf_store_bf16(y + GROUP + i, value - vf_load_bf16(y + i));
    }
    if (has_quads(format)) order_quads(y, GROUP);
}

// Half a group, of a whole one.
INLINE void round_half_group(const int format, const float *x, bf16 *y) {
#if defined(__AVX512BF16__)
    if (has_quads(format)) {
        const __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)vf_load(x) * (__m512)vf_splat(amx_unit(format)));
        const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
        _mm256_storeu_si256((__m256i *)y, _mm256_shuffle_epi8(rounded, _mm256_broadcastsi128_si256(order)));
        return;
    }
#endif
    for (int i = 0; i < GROUP / 2; i += WIDTH) {
        const vf value = vf_load(x + i) * vf_splat(amx_unit(format));
        vf_store_bf16(y + i, value);
        if (format <= Q8_0) vf_store_bf16(y + GROUP + i, value - vf_load_bf16(y + i));
    }
    if (has_quads(format)) order_quads(y, GROUP / 2);
}

// Where the group of an input of a row lies.
INLINE bf16 *group_of(void *activations, const int format, int64_t in_features, int64_t row, int64_t input) {
    char *at = (char *)activations + row * activation_bytes(format, in_features);
    return (bf16 *)(at + input / GROUP * activation_bytes(format, GROUP));
}

#endif
