// A group of 32 inputs of a block as a tile of weights: pairs of bfloat16, [16 pairs][16 outputs][2].
//
// Weights are computed in float16, two in a lane: code * scale + min with one rounding, then 7 bits of mantissa. The
// exponent keeps float16's five bits, so a weight in a tile is 2^-108 of its value: 2^-112 by the place of the exponent
// and 2^4 from the scales, which keeps weights down to 2^-18 normal numbers. (Those below count as zero, as with AMX
// every subnormal number does, and those from 4096 on as about 4096.)
//
// Codes of 4 to 6 bits lie in quads. Their pairs are inputs 0 and 2, then 1 and 3 of a quad: no byte has to move.
// Activations have the same order.

#pragma once

#include "code_tile.h"

#if HAS_AMX

// The sums of products want 2^54 twice: in the activations and at the end. Weights in bfloat16 are used as they are.
#define AMX_UNIT 0x1p54f

typedef int16_t words __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t unsigned_words __attribute__((vector_size(WIDTH * 4)));

INLINE int has_quads(const int format) { return format > Q8_0; }

INLINE float amx_unit(const int format) { return format == BF16 ? 1.0f : AMX_UNIT; }

// Each number times 2^4 as float16, in both halves of its lane.
INLINE vi both_halves(vf x) {
#if WIDTH == 16
    const __m256i half = _mm512_cvtps_ph((__m512)(x * vf_splat(16.0f)), _MM_FROUND_TO_NEAREST_INT);
    const vi low = (vi)_mm512_cvtepu16_epi32(half);
#else
    f16 half[WIDTH];
    vf_store_f16(half, x * vf_splat(16.0f));
    const vi low = vi_load_u16(half);
#endif
    return low | low << 16;
}

#if defined(__AVX512FP16__)

INLINE words scaled_words(words codes, vi scale, vi min) {
    return (words)_mm512_fmadd_ph(_mm512_cvtepi16_ph((__m512i)codes), (__m512h)scale, (__m512h)min);
}

#else  // for tests

INLINE vf float_of_halves(vi x, const int upper) {
    f16 half[WIDTH];
    vi_store_16(half, upper ? (vi)((vu)x >> 16) : x & vi_splat(0xffff));
    return vf_load_f16(half);
}

INLINE words scaled_words(words codes, vi scale, vi min) {
    f16 half[2][WIDTH];
    for (int upper = 0; upper < 2; upper++) {
        const vf code = vf_from_int(upper ? (vi)codes >> 16 : ((vi)codes << 16) >> 16);
        vf_store_f16(half[upper], vf_fma(code, float_of_halves(scale, upper), float_of_halves(min, upper)));
    }
    return (words)(vi_load_u16(half[0]) | vi_load_u16(half[1]) << 16);
}

#endif

// To bfloat16's place, rounded to nearest, ties away from zero.
INLINE vi pairs_of(words codes, vi scale, vi min) {
    return (vi)((scaled_words(codes, scale, min) + 4) >> 3) & vi_splat((int32_t)0x8fff8fff);
}

INLINE void fill_from_bytes(const char *group, char *tile) {
#pragma GCC unroll 4
    for (int part = 0; part < VECTORS; part++) {
        const vi scale = both_halves(vf_load_f16((const f16 *)(group + GROUP * BLOCK_COLS) + part * WIDTH));
#pragma GCC unroll 16
        for (int pair = 0; pair < GROUP / 2; pair++) {
            const vi codes = vi_load_s8_pairs((const int8_t *)group + 2 * pair * BLOCK_COLS + part * WIDTH * 2);
            vi_store(tile + pair * AMX_BYTES + part * WIDTH * 4, pairs_of((words)codes, scale, vi_splat(0)));
        }
    }
}

INLINE vf min_of(const int format, const char *super, const char *group, const vf scale, const int part) {
    const float zero = format == Q4_0 ? -8.0f : format == MXFP4 ? -(float)FP4_ZERO : -32.0f;
    return format == Q4_0 || format == Q6_K || format == MXFP4 ? scale * vf_splat(zero) : load_min(format, super, group, part);
}

INLINE void fill_from_quads(const int format, const char *super, const char *group, char *tile) {
#pragma GCC unroll 4
    for (int part = 0; part < VECTORS; part++) {
        vi scale, min;
#pragma GCC unroll 8
        for (int quad = 0; quad < 8; quad++) {
            if (quad == 0 || (quad == 4 && format == Q6_K)) {
                const vf wide = load_scale(format, super, group, quad / 4, part);
                scale = both_halves(wide), min = both_halves(min_of(format, super, group, wide, part));
            }
            const vi codes = load_codes(format, group, quad, part);
            const words even = (words)(codes & vi_splat(0x00ff00ff)), odd = (words)((unsigned_words)codes >> 8);
            char *to = tile + 2 * quad * AMX_BYTES + part * WIDTH * 4;
            vi_store(to, pairs_of(even, scale, min));
            vi_store(to + AMX_BYTES, pairs_of(odd, scale, min));
        }
    }
}

#endif
