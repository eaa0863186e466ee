// Products of a few rows of int8 activations with one or two blocks of codes of 4, 5 or 6 bits (Q4_0 to Q6_K, MXFP4):
// exact sums over a group of 32 (Q6_K: 16), then float32.

#pragma once

#include "packed.h"

// Rows of a tile of one block, and of two.
#if WIDTH == 16
#define CODE_ROWS 8
#define CODE_ROWS_OF_TWO 4
#else
#define CODE_ROWS 4
#define CODE_ROWS_OF_TWO 1
#endif

typedef struct {
    vi of[CODE_ROWS][2 * VECTORS];
} Dots;

typedef struct {
    vf of[CODE_ROWS][2 * VECTORS];
} CodeSums;

// Vectors of codes whose products dots_sum may widen together: 16 bits must hold the sum (simd.h).
INLINE int vectors_in_a_run(const int format) {
    const int largest = format == Q6_K ? 63 : format == Q5_K ? 31 : format == MXFP4 ? 2 * FP4_ZERO : 15;
    const int most = format == Q6_K ? 4 : 8;  // vectors that share a scale, of which a run is a part
    return DOT4_MAX_SUM / (2 * largest) < most ? (format == MXFP4 ? 4 : DOT4_MAX_SUM / (2 * largest)) : most;
}

// The codes of quad q = 2j + (is_high) of a group: uint8 in each byte.
INLINE vi load_codes(const int format, const char *group, const int quad, const int part) {
    const vi low_bits = vi_splat(0x0f0f0f0f);
    const vi both = vi_load(group + quad / 2 * 64 + part * WIDTH * 4);
    const vi low = (quad & 1 ? (vi)((vu)both >> 4) : both) & low_bits;
    if (format == Q5_K) {
        const vi bits = vi_load(group + CODE_BYTES + part * WIDTH * 4) & vi_splat((int32_t)(0x01010101u << quad));
        return low | (quad < 4 ? bits << (4 - quad) : (vi)((vu)bits >> (quad - 4)));
    }
    if (format == Q6_K) {
        const int at = quad % 4 * 2;
        const vi plane = vi_load(group + CODE_BYTES + quad / 4 * 64 + part * WIDTH * 4);
        const vi bits = plane & vi_splat((int32_t)(0x03030303u << at));
        return low | (at < 4 ? bits << (4 - at) : (vi)((vu)bits >> (at - 4)));
    }
    if (format == MXFP4) return vi_look_up(FP4_NUMBERS, low);
    return low;
}

// total[r][v] += products of quads [begin, end) of a group.
INLINE void add_quads(
    const int format, const int rows, const int vectors, const int begin, const int end, const Group8 *x,
    int64_t x_stride, const char *const group[2], Dots *total) {
    Dots run;
#pragma GCC unroll 8
    for (int quad = begin; quad < end; quad++) {
        vi codes[2 * VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) codes[v] = load_codes(format, group[v / VECTORS], quad, v % VECTORS);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const vi values = vi_splat_bytes(x[r * x_stride].values + 4 * quad);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) {
                run.of[r][v] = dot4(quad == begin ? dots_zero() : run.of[r][v], codes[v], values);
                keep_here(run.of[r][v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) total->of[r][v] += dots_sum(run.of[r][v]);
}

#if defined(HAS_MATRIX_DOT8)
#include "matrix_quads.h"
#endif

// The scale of a group (Q6_K: of half a group) for the outputs of one vector. K-quants have it in two factors.
INLINE vf load_scale(const int format, const char *super, const char *group, const int half, const int part) {
    const char *end = group + group_bytes(format) - 2 * BLOCK_COLS;
    if (format == Q4_0) return vf_load_f16((const f16 *)end + part * WIDTH);
    if (format == MXFP4) return half_power(vi_load_u8((const uint8_t *)group + CODE_BYTES + part * WIDTH));
    if (format == Q4_1) return vf_load_f16((const f16 *)(end - 2 * BLOCK_COLS) + part * WIDTH);
    const vf common = vf_load_f16((const f16 *)super + part * WIDTH);
    if (format == Q6_K) return common * vf_from_int(vi_load_s8((const int8_t *)end + half * BLOCK_COLS + part * WIDTH));
    return common * vf_from_int(vi_load_u8((const uint8_t *)end + part * WIDTH));
}

// What is added to each value of a group: Q4_1's minimum, or the negative of the K-quants'.
INLINE vf load_min(const int format, const char *super, const char *group, const int part) {
    const char *end = group + group_bytes(format) - 2 * BLOCK_COLS;
    if (format == Q4_1) return vf_load_f16((const f16 *)end + part * WIDTH);
    const vf common = vf_load_f16((const f16 *)super + BLOCK_COLS + part * WIDTH);
    return vf_zero() - common * vf_from_int(vi_load_u8((const uint8_t *)end + BLOCK_COLS + part * WIDTH));
}

INLINE void add_scaled(
    const int format, const int rows, const int vectors, const int half, const Group8 *x, int64_t x_stride,
    const char *const super[2], const char *const group[2], const Dots *dots, CodeSums *sums) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) {
        const vf scale = load_scale(format, super[v / VECTORS], group[v / VECTORS], half, v % VECTORS);
        const int has_min = format == Q4_1 || format == Q4_K || format == Q5_K;
        const vf min = has_min ? load_min(format, super[v / VECTORS], group[v / VECTORS], v % VECTORS) : vf_zero();
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const Group8 *row = x + r * x_stride;
            vf sum = vf_fma(vf_from_int(dots->of[r][v]), vf_splat(row->scale) * scale, sums->of[r][v]);
            if (has_min) sum = vf_fma(vf_splat(row->scaled_sum), min, sum);
            sums->of[r][v] = sum;
        }
    }
}

// Add the zero point: codes are 0 to 15 for -8 to 7, 0 to 63 for -32 to 31, and MXFP4's 0 to 24 for -12 to 12.
INLINE void add_zero_point(
    const int format, const int rows, const int vectors, const int half, const Group8 *x, int64_t x_stride,
    Dots *dots) {
    const int32_t of_halves = half ? (int32_t)0xffe00000 : (int32_t)0x0000ffe0;
    const int32_t of_both = format == MXFP4 ? (int32_t)0xfff4fff4 : (int32_t)0xfff8fff8;
    const int32_t zeros = format == Q6_K ? of_halves : of_both;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        const vi zero_point = dot2(vi_splat(0), vi_splat_bytes(x[r * x_stride].sums), vi_splat(zeros));
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            dots->of[r][v] += zero_point;
            keep_here(dots->of[r][v]);
        }
    }
}

INLINE void add_group(
    const int format, const int rows, const int vectors, const Group8 *x, int64_t x_stride, const char *const super[2],
    const char *const group[2], CodeSums *sums) {
    const int halves = format == Q6_K ? 2 : 1, quads = 8 / halves, run = vectors_in_a_run(format);
#pragma GCC unroll 2
    for (int half = 0; half < halves; half++) {
        Dots dots;
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) dots.of[r][v] = vi_splat(0);
#pragma GCC unroll 4
        for (int quad = 0; quad < quads; quad += run) {
            const int begin = half * quads + quad;
#if defined(HAS_MATRIX_DOT8)
            if (rows > 1) {
                add_quads_of_pairs(format, rows, vectors, begin, begin + run, x, x_stride, group, &dots);
                continue;
            }
#endif
            add_quads(format, rows, vectors, begin, begin + run, x, x_stride, group, &dots);
        }
        if (format == Q4_0 || format == Q6_K || format == MXFP4) add_zero_point(format, rows, vectors, half, x, x_stride, &dots);
        add_scaled(format, rows, vectors, half, x, x_stride, super, group, &dots, sums);
    }
}

// sums[block][row][16] += x[row] * block, over `groups` of 32 inputs (K-quants: a multiple of 8). `x_stride` counts
// groups. Weights `ahead` bytes behind those in use are prefetched.
INLINE void code_tile(
    const int format, const int rows, const int blocks, const Group8 *x, int64_t x_stride, const char *const w[2],
    int64_t groups, int64_t ahead, float *const out[2]) {
    const int vectors = blocks * VECTORS;
    CodeSums sums;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            sums.of[r][v] = vf_load(out[v / VECTORS] + r * BLOCK_COLS + v % VECTORS * WIDTH);
        }
    const int together = is_k_quant(format) ? SUPER_GROUP / GROUP : 1;
    const char *super[2] = {w[0], w[blocks - 1]};
    for (int64_t g = 0; g < groups; g += together) {
        const int64_t shared = is_k_quant(format) ? super_bytes(format) : 0;
        for (int i = 0; i < together; i++) {
            const int64_t at = shared + i * group_bytes(format);
            const char *const group[2] = {super[0] + at, super[1] + at};
            for (int b = 0; b < blocks; b++) prefetch(group[b] + ahead, group_bytes(format));
            add_group(format, rows, vectors, x + g + i, x_stride, super, group, &sums);
        }
        for (int b = 0; b < 2; b++) super[b] += shared + together * group_bytes(format);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            vf_store(out[v / VECTORS] + r * BLOCK_COLS + v % VECTORS * WIDTH, sums.of[r][v]);
        }
}
