// One output of packed weights as float32: exactly the file's values.

#pragma once

#include "packed.h"

// The 32 codes of column `col` in a group.
INLINE void load_column(const int format, const uint8_t *group, int64_t col, uint8_t codes[GROUP]) {
    for (int quad = 0; quad < 8; quad++) {
        uint32_t word, high = 0;
        memcpy(&word, group + quad / 2 * 64 + col * 4, sizeof word);
        word = (quad & 1 ? word >> 4 : word) & 0x0f0f0f0fu;
        if (format == Q5_K) {
            memcpy(&high, group + CODE_BYTES + col * 4, sizeof high);
            high = (high >> quad & 0x01010101u) << 4;
        } else if (format == Q6_K) {
            memcpy(&high, group + CODE_BYTES + quad / 4 * 64 + col * 4, sizeof high);
            high = (high >> quad % 4 * 2 & 0x03030303u) << 4;
        }
        word |= high;
        memcpy(codes + 4 * quad, &word, sizeof word);
    }
}

// The numbers of group `g` of column `col`.
INLINE void unpack_group(const int format, const uint8_t *block, int64_t g, int64_t col, float *out) {
    const int64_t in_super = g % (SUPER_GROUP / GROUP), bytes = group_bytes(format);
    if (format == Q8_0) {
        const uint8_t *group = block + g * bytes;
        const float scale = float_of_f16(((const f16 *)(group + GROUP * BLOCK_COLS))[col]);
        for (int k = 0; k < GROUP; k++) {
            out[k] = scale * (float)(int8_t)group[k / 2 * 2 * BLOCK_COLS + col * 2 + k % 2];
        }
        return;
    }
    const uint8_t *super = block + g / (SUPER_GROUP / GROUP) * (super_bytes(format) + SUPER_GROUP / GROUP * bytes);
    const uint8_t *group = is_k_quant(format) ? super + super_bytes(format) + in_super * bytes : block + g * bytes;
    const uint8_t *end = group + bytes - 2 * BLOCK_COLS;
    uint8_t codes[GROUP];
    load_column(format, group, col, codes);
    if (format == MXFP4) {
        const float scale = half_power(vi_splat(group[CODE_BYTES + col]))[0];
        for (int k = 0; k < GROUP; k++) out[k] = scale * (float)(FP4_NUMBERS[codes[k]] - FP4_ZERO);
        return;
    }
    if (format == Q4_0 || format == Q6_K) {
        const float common = float_of_f16(((const f16 *)(format == Q4_0 ? end : super))[col]);
        const int zero = format == Q4_0 ? 8 : 32;
        for (int k = 0; k < GROUP; k++) {
            const float scale = format == Q4_0 ? common : common * (float)(int8_t)end[k / 16 * BLOCK_COLS + col];
            out[k] = scale * (float)(codes[k] - zero);
        }
        return;
    }
    const f16 *floats = (const f16 *)(format == Q4_1 ? end - 2 * BLOCK_COLS : super);
    float scale = float_of_f16(floats[col]), min = float_of_f16(floats[BLOCK_COLS + col]);
    if (format != Q4_1) scale *= (float)end[col], min *= -(float)end[BLOCK_COLS + col];
    for (int k = 0; k < GROUP; k++) out[k] = scale * (float)codes[k] + min;
}

INLINE void unpack_column(const int format, const uint8_t *block, int64_t in_features, int64_t col, float *out) {
    if (format == F32) {
        for (int64_t k = 0; k < in_features; k++) out[k] = ((const float *)block)[k * BLOCK_COLS + col];
    } else if (format == BF16) {
        for (int64_t k = 0; k < in_features; k++) {
            out[k] = float_of_bf16(((const bf16 *)block)[(k / 2 * BLOCK_COLS + col) * 2 + k % 2]);
        }
    } else if (format == F16) {
        for (int64_t k = 0; k < in_features; k++) out[k] = float_of_f16(((const f16 *)block)[k * BLOCK_COLS + col]);
    } else {
        for (int64_t g = 0; g < in_features / GROUP; g++) unpack_group(format, block, g, col, out + g * GROUP);
    }
}

// Output `row` of weights whose blocks are `stride` bytes apart.
static inline void unpack_row(
    int64_t format, const void *packed, int64_t stride, int64_t in_features, int64_t row, float *out) {
    const uint8_t *block = (const uint8_t *)packed + row / BLOCK_COLS * stride;
    switch (format) {
#define CASE(format) case format: unpack_column(format, block, in_features, row % BLOCK_COLS, out); break;
        CASE(F32) CASE(BF16) CASE(F16) CASE(Q8_0) CASE(Q4_0) CASE(Q4_1) CASE(Q4_K) CASE(Q5_K) CASE(Q6_K) CASE(MXFP4)
#undef CASE
    }
}
