// The primitives that every kernel is written on. One header per instruction set fills in what differs.
//
// `vf` holds WIDTH floats, `vi` WIDTH int32. Arithmetic is written with operators (vector extensions of gcc and clang);
// the build forbids contraction, so a * b + c rounds twice and vf_fma once, whatever the compiler thinks of it.
// Loads and stores take any address. `_n` variants touch the first n lanes only (0 <= n <= WIDTH), the rest is zero.
//
// From the set's header: WIDTH, vf_splat, vf_fma, vf_min, vf_max (both: the second operand if either is NaN), vf_sqrt,
// vf_load_n, vf_store_n, vf_load_f16, vf_store_f16, vf_sum, vf_max_of, vi_round, vf_from_int, vi_load_u8, vi_load_s8,
// vi_load_u16, vi_store_16, vi_store_8, vf_transpose, COLUMNS, vf_load_columns, and for integer products: dots,
// dots_zero, dot4, dots_sum, DOT4_MAX_SUM, vi_load_s8_pairs, dot2, vi_look_up.

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX2__)
#define WIDTH 8
#elif defined(__aarch64__)
#define WIDTH 4
#else
#error "no instruction set that the kernels are written for"
#endif

typedef float vf __attribute__((vector_size(WIDTH * 4)));
typedef int32_t vi __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t vu __attribute__((vector_size(WIDTH * 4)));

typedef uint16_t bf16;
typedef uint16_t f16;

INLINE vf vf_load(const float *from) {
    vf x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void vf_store(float *to, vf x) { memcpy(to, &x, sizeof x); }

INLINE vi vi_load(const void *from) {
    vi x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void vi_store(void *to, vi x) { memcpy(to, &x, sizeof x); }

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_neon.h"
#endif

INLINE vf vf_zero(void) { return (vf){0}; }

// Ask for a line of memory for this core alone.
INLINE void prefetch_to_write(const void *at) {
#if defined(__x86_64__)
    __asm__ volatile("prefetchw %0" ::"m"(*(const char *)at));
#else
    __builtin_prefetch(at, 1, 3);
#endif
}

INLINE vf vf_abs(vf x) { return (vf)((vi)x & vi_splat(0x7fffffff)); }

// The 4 bytes at `from` (four int8, two int16) in every lane.
INLINE vi vi_splat_bytes(const void *from) {
    int32_t both;
    memcpy(&both, from, sizeof both);
    return vi_splat(both);
}

INLINE vf vf_load_bf16(const bf16 *from) { return (vf)(vi_load_u16(from) << 16); }

// Rounds to nearest, ties to even. NaN stays NaN.
INLINE void vf_store_bf16(bf16 *to, vf x) {
    const vu bits = (vu)x;
    const vi rounded = (vi)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    const vi quiet = (vi)((bits >> 16) | 0x40u);
    const vi is_nan = (vi)(x != x);
    vi_store_16(to, (quiet & is_nan) | (rounded & ~is_nan));
}

INLINE float float_of_f16(f16 x) {
    f16 lanes[WIDTH] = {x};
    return vf_load_f16(lanes)[0];
}

INLINE float float_of_bf16(bf16 x) {
    const uint32_t bits = (uint32_t)x << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

// e^x to about 2 ulp: 2^n * e^r with a polynomial in r. x is cut to [-87, 88]; NaN stays NaN.
INLINE vf vf_exp(vf x) {
    x = vf_max(vf_splat(-87.0f), vf_min(vf_splat(88.0f), x));
    const vi whole = vi_round(x * vf_splat(1.44269504f));
    const vf n = vf_from_int(whole);
    vf r = vf_fma(n, vf_splat(-0.693359375f), x);
    r = vf_fma(n, vf_splat(2.12194440e-4f), r);
    vf p = vf_splat(1.0f / 720);
    p = vf_fma(p, r, vf_splat(1.0f / 120));
    p = vf_fma(p, r, vf_splat(1.0f / 24));
    p = vf_fma(p, r, vf_splat(1.0f / 6));
    p = vf_fma(p, r, vf_splat(0.5f));
    p = vf_fma(p, r, vf_splat(1.0f));
    p = vf_fma(p, r, vf_splat(1.0f));
    return p * (vf)(vi)((vu)(whole + vi_splat(127)) << 23);
}

INLINE vf vf_silu(vf x) { return x / (vf_splat(1.0f) + vf_exp(vf_zero() - x)); }

// GELU with the approximation by tanh: x / 2 (1 + tanh z) is x sigmoid(2 z), with z = sqrt(2 / pi) (x + 0.044715 x^3).
INLINE vf vf_gelu_tanh(vf x) {
    const vf twice_z = x * vf_splat(1.5957691216f) * vf_fma(x * x, vf_splat(0.044715f), vf_splat(1.0f));
    return x / (vf_splat(1.0f) + vf_exp(vf_zero() - twice_z));
}

// (u + 1) g sigmoid(1.702 g), with g cut from above and u from both sides (SWIGLU_LIMIT and SWIGLU_SLOPE of device.py).
INLINE vf vf_clamped_swiglu(vf gate, vf up) {
    const vf limit = vf_splat(7.0f), g = vf_min(limit, gate), u = vf_max(vf_zero() - limit, vf_min(limit, up));
    return (u + vf_splat(1.0f)) * (g / (vf_splat(1.0f) + vf_exp(g * vf_splat(-1.702f))));
}

enum Activation { SILU = 0, GELU_TANH = 1, CLAMPED_SWIGLU = 2 };  // of gated layers

INLINE vf vf_gated(int64_t activation, vf gate, vf up) {
    if (activation == CLAMPED_SWIGLU) return vf_clamped_swiglu(gate, up);
    return (activation == GELU_TANH ? vf_gelu_tanh(gate) : vf_silu(gate)) * up;
}

// The same to about 12 bits where that is faster, for what is rounded to bfloat16. NaN stays NaN.
#if WIDTH == 16
INLINE vf vf_rough_gated(int64_t activation, vf gate, vf up) {
    if (activation == CLAMPED_SWIGLU) return vf_clamped_swiglu(gate, up);
    vf z = gate * vf_splat(activation == GELU_TANH ? -2.3022082f : -1.44269504f);  // exponents as above, but of 2
    if (activation == GELU_TANH) z *= vf_fma(gate * gate, vf_splat(0.044715f), vf_splat(1.0f));
    z = vf_max(vf_splat(-125.0f), vf_min(vf_splat(125.0f), z));
    return gate * vf_rough_inverse(vf_splat(1.0f) + vf_rough_exp2(z)) * up;
}
#else
INLINE vf vf_rough_gated(int64_t activation, vf gate, vf up) { return vf_gated(activation, gate, up); }
#endif
