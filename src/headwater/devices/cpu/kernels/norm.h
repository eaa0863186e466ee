// RMSNorm of one row, which layers and QK-norm share.

#pragma once

#include "simd.h"

// The sum of x * x
INLINE float square_sum(const float *x, int64_t size) {
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
    return vf_sum(squares + more);
}

// 1 / rms of numbers whose squares add up to this
INLINE float scale_of_squares(float square_sum, int64_t size, float eps) {
    return 1.0f / sqrtf(square_sum / (float)size + eps);
}

// 1 / rms(x)
INLINE float norm_scale(const float *x, int64_t size, float eps) {
    return scale_of_squares(square_sum(x, size), size, eps);
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

// y = x * factor * weight; y may be x.
INLINE void scale_row(const float *x, const float *weight, float *y, int64_t size, float factor) {
    const int64_t whole = size / WIDTH * WIDTH, rest = size - whole;
    const vf scale = vf_splat(factor), last = vf_load_n(x + whole, rest);
    for (int64_t i = 0; i < whole; i += WIDTH) vf_store(y + i, vf_load(x + i) * scale * vf_load(weight + i));
    vf_store_n(y + whole, last * scale * vf_load_n(weight + whole, rest), rest);
}

// y = x / rms(x) * weight; y may be x.
INLINE void norm_row(const float *x, const float *weight, float *y, int64_t size, float eps) {
    scale_row(x, weight, y, size, norm_scale(x, size, eps));
}
