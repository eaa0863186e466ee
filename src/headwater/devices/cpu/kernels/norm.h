// RMSNorm of one row, which layers and QK-norm share.

#pragma once

#include "simd.h"

// 1 / rms(x)
INLINE float norm_scale(const float *x, int64_t size, float eps) {
    const int64_t whole = size / WIDTH * WIDTH, rest = size - whole;
    vf squares = vf_zero(), more = vf_zero();
    int64_t i = 0;
    for (; i + WIDTH < whole; i += 2 * WIDTH) {
        const vf first = vf_load(x + i), second = vf_load(x + i + WIDTH);
        squares = vf_fma(first, first, squares);
        more = vf_fma(second, second, more);
    }
    for (; i < whole; i += WIDTH) squares = vf_fma(vf_load(x + i), vf_load(x + i), squares);
    const vf last = vf_load_n(x + whole, rest);
    more = vf_fma(last, last, more);
    return 1.0f / sqrtf(vf_sum(squares + more) / (float)size + eps);
}

// y += x / rms(x) * weight
INLINE void add_norm_row(const float *x, const float *weight, float *y, int64_t size, float eps) {
    const int64_t whole = size / WIDTH * WIDTH, rest = size - whole;
    const vf scale = vf_splat(norm_scale(x, size, eps)), last = vf_load_n(x + whole, rest) * scale;
    for (int64_t i = 0; i < whole; i += WIDTH) {
        vf_store(y + i, vf_fma(vf_load(x + i) * scale, vf_load(weight + i), vf_load(y + i)));
    }
    vf_store_n(y + whole, vf_fma(last, vf_load_n(weight + whole, rest), vf_load_n(y + whole, rest)), rest);
}

// y = x / rms(x) * weight; y may be x.
INLINE void norm_row(const float *x, const float *weight, float *y, int64_t size, float eps) {
    const int64_t whole = size / WIDTH * WIDTH, rest = size - whole;
    const vf scale = vf_splat(norm_scale(x, size, eps)), last = vf_load_n(x + whole, rest);
    for (int64_t i = 0; i < whole; i += WIDTH) vf_store(y + i, vf_load(x + i) * scale * vf_load(weight + i));
    vf_store_n(y + whole, last * scale * vf_load_n(weight + whole, rest), rest);
}
