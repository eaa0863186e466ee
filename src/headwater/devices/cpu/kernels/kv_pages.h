// Where the keys and values of a layer lie (devices/kv_memory.py), and their conversion to and from float32.

#pragma once

#include "attention.h"
#include "simd.h"

// Scaling by 2^-exponent brings the largest number of a head to [128, 256): devices/float8.py.
enum { LARGEST_EXPONENT = 7, MIN_EXPONENT = -40, NOT_FINITE_EXPONENT = 128 - LARGEST_EXPONENT };

INLINE int64_t kv_item_bytes(int64_t dtype) { return dtype == KV_F32 ? 4 : dtype <= KV_F16 ? 2 : 1; }
INLINE int kv_is_scaled(int64_t dtype) { return dtype >= KV_E4M3; }

INLINE int64_t qkv_stride(const AttentionJob *job) { return (job->num_heads + 2 * job->num_kv_heads) * job->head_dim; }

// From a token's key to its value, in bytes.
INLINE int64_t value_offset(const AttentionJob *job) {
    return job->num_kv_heads * job->page_size * job->head_dim * kv_item_bytes(job->kv_dtype);
}

INLINE uint8_t *page_of(const AttentionJob *job, const Step *step, int64_t page) {
    return (uint8_t *)step->kv + page * job->page_bytes + job->layer_offset;
}

// The key of a head's token at `offset` of a page; its value is value_offset further.
INLINE uint8_t *key_at(const AttentionJob *job, uint8_t *page, int64_t head, int64_t offset) {
    return page + (head * job->page_size + offset) * job->head_dim * kv_item_bytes(job->kv_dtype);
}

// The exponent of that key; the value's is num_kv_heads * page_size further.
INLINE int8_t *exponent_at(const AttentionJob *job, uint8_t *page, int64_t head, int64_t offset) {
    return (int8_t *)page + 2 * value_offset(job) + head * job->page_size + offset;
}

INLINE float power_of_two(int exponent) {
    const uint32_t bits = (uint32_t)(exponent + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return power;
}

// What a head's numbers are multiplied with. A head that held NaN or infinity is NaN as a whole.
INLINE vf scale_of(int8_t exponent) {
    return vf_splat(exponent >= NOT_FINITE_EXPONENT ? NAN : power_of_two(exponent));
}

// WIDTH numbers from a head's dimension d on. `dtype` is a constant where this is inlined. An 8-bit float is moved to
// the upper bits of a float32, whose exponent is then too small by the difference of the biases.
INLINE vf load_kv(const int dtype, const uint8_t *head, int64_t d, vf scale) {
    if (dtype == KV_F32) return vf_load((const float *)head + d);
    if (dtype == KV_BF16) return vf_load_bf16((const bf16 *)head + d);
    if (dtype == KV_F16) return vf_load_f16((const f16 *)head + d);
    const vi bits = vi_load_u8(head + d);
    const vi sign = (bits & vi_splat(0x80)) << 24, magnitude = bits & vi_splat(0x7f);
    if (dtype == KV_E4M3) return (vf)(sign | (magnitude << 20)) * vf_splat(0x1p120f) * scale;
    return (vf)(sign | (magnitude << 21)) * vf_splat(0x1p112f) * scale;
}

// The same for the last n < WIDTH numbers of a head; the other lanes are zero. Nothing behind the head is read.
INLINE vf load_kv_n(const int dtype, const uint8_t *head, int64_t d, int64_t n, vf scale) {
    if (dtype == KV_F32) return vf_load_n((const float *)head + d, n);
    uint8_t padded[WIDTH * 2] = {0};
    const int64_t item = kv_item_bytes(dtype);
    memcpy(padded, head + d * item, (size_t)(n * item));
    return load_kv(dtype, padded, 0, scale);
}

// The nearest 8-bit float of each lane, ties to even. |x| < 256, or not finite.
INLINE vi float8_of(const int dtype, vf x) {
    const int mantissa = dtype == KV_E4M3 ? 3 : 2, bias = dtype == KV_E4M3 ? 7 : 15, shift = 23 - mantissa;
    const vu bits = (vu)vf_abs(x), lsb = (bits >> shift) & 1u;
    const vu normal = ((bits + ((1u << (shift - 1)) - 1u) + lsb) >> shift) - ((127u - (unsigned)bias) << mantissa);
    const vi is_small = (vi)(bits < (vu){0} + ((uint32_t)(128 - bias) << 23));  // below 2^(1 - bias): no normal number
    const vi subnormal = vi_round((vf)((vi)bits & is_small) * vf_splat(power_of_two(bias - 1 + mantissa)));
    const vi is_infinite = (vi)(bits >= (vu){0} + 0x7f800000u), is_nan = (vi)(x != x);
    const vi infinity = vi_splat(dtype == KV_E4M3 ? 0x7e : 0x7c);  // e4m3 has none: its largest number
    vi code = (subnormal & is_small) | ((vi)normal & ~is_small);
    code = (code & ~is_infinite) | (infinity & is_infinite);
    code = (code & ~is_nan) | (vi_splat(0x7f) & is_nan);
    return code | (vi)(((vu)x >> 24) & 0x80u);
}

INLINE int8_t exponent_for(const float *x, int64_t dim) {
    int32_t largest = 0;  // bits of absolute values order as integers, NaN and infinity last
    for (int64_t d = 0; d < dim; d++) {
        int32_t bits;
        memcpy(&bits, x + d, sizeof bits);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    const int exponent = (largest >> 23) - 127 - LARGEST_EXPONENT;
    return (int8_t)(exponent < MIN_EXPONENT ? MIN_EXPONENT : exponent);
}

// Store up to WIDTH numbers at a head's dimension d. `inverse` is 2^-exponent.
INLINE void store_kv(const int dtype, uint8_t *head, int64_t d, vf x, int64_t n, vf inverse) {
    uint8_t padded[WIDTH * 4];
    const int64_t item = kv_item_bytes(dtype);
    if (dtype == KV_F32) vf_store((float *)padded, x);
    if (dtype == KV_BF16) vf_store_bf16((bf16 *)padded, x);
    if (dtype == KV_F16) vf_store_f16((f16 *)padded, x);
    if (kv_is_scaled(dtype)) {
        const vi codes = float8_of(dtype, x * inverse);
        for (int lane = 0; lane < WIDTH; lane++) padded[lane] = (uint8_t)codes[lane];
    }
    memcpy(head + d * item, padded, (size_t)((n < WIDTH ? n : WIDTH) * item));
}
