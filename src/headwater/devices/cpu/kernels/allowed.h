// Masks of the tokens that a row may choose from: bit t % 32 of word t / 32 stands for token t.

#pragma once

#include "simd.h"

INLINE vi select_lanes(vi mask, vi yes, vi no) { return (yes & mask) | (no & ~mask); }

INLINE vf select_floats(vi mask, vf yes, vf no) { return (vf)select_lanes(mask, (vi)yes, (vi)no); }

INLINE vi lane_numbers(void) {
    static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return vi_load(numbers);
}

// The bits of 32 tokens from `col` (a multiple of 32) on; those behind the vocabulary are 0, whatever the mask holds.
INLINE uint32_t allowed_within(const uint32_t *mask, int64_t col, int64_t cols) {
    if (col >= cols) return 0;
    return cols - col < 32 ? mask[col / 32] & ((1u << (cols - col)) - 1) : mask[col / 32];
}

// x where the low WIDTH bits of `allowed` are set, -infinity elsewhere.
INLINE vf only_allowed(vf x, uint32_t allowed) {
    static const int32_t bits[16] = {1,      1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                     1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
    const vi is_allowed = (vi)((vi_splat((int32_t)allowed) & vi_load(bits)) != vi_splat(0));
    return select_floats(is_allowed, x, vf_splat(-INFINITY));
}

// 0 if no token is allowed.
static inline int32_t first_allowed(const uint32_t *mask, int64_t cols) {
    for (int64_t col = 0; col < cols; col += 32) {
        const uint32_t allowed = allowed_within(mask, col, cols);
        if (allowed) return (int32_t)col + __builtin_ctz(allowed);
    }
    return 0;
}
