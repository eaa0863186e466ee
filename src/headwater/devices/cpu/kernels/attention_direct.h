// The two products of attention for a few stacked queries that all see the same keys, such as a decode's.
//
// Packing a part pays when many queries use it. Here keys and values, of bfloat16 or float32, go from the pages into
// registers and are multiplied there. Each sum is the chain of attention_tile.h, so bits are the same.

#pragma once

#include "attention_work.h"

enum { DIRECT_ROWS = 4 };                  // queries whose sums fit in registers
enum { MAX_DIRECT = WIDTH == 8 ? 4 : 8 };  // stacked queries; on AVX2 packing is quicker for 5 and more

// Whether the products of a block of `num` keys are computed directly. Dims with a tail are left to packing.
INLINE int is_direct(const Work *work, int64_t first, int num) {
    const AttentionJob *job = work->job;
    const int has_dtype = job->kv_dtype == KV_F32 || job->kv_dtype == KV_BF16;
    return has_dtype && work->stacked <= MAX_DIRECT && job->head_dim % (2 * WIDTH) == 0 &&
           visible_keys(work, 0, first) >= num && hidden_from_any(work, first) == 0;
}

INLINE int direct_rows_for(int rows) {  // equal groups
    const int groups = (rows + DIRECT_ROWS - 1) / DIRECT_ROWS;
    return (rows + groups - 1) / groups;
}

// sums[query] += a dim of the queries x that dim of WIDTH keys
INLINE void add_dim(const int rows, vf sums[DIRECT_ROWS][2], int half, const float *queries, int64_t stride, vf keys) {
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) {
        sums[row][half] = vf_fma(vf_splat(queries[row * stride]), keys, sums[row][half]);
    }
}

// Scores of PANEL keys from `key` of the block on against `rows` queries. Keys behind the last one repeat it.
INLINE void score_keys(const int is_bf16, const int rows, const Work *work, const Located *at, int key, const Ahead *ahead,
                       int row) {
    const int64_t dim = work->job->head_dim;
    const float *queries = scratch.queries + row * dim;
    int skip = key % work->part_keys;
    const uint8_t *from[PANEL];
    vf sums[DIRECT_ROWS][2] = {0};
    for (int i = 0; i < PANEL; i++) from[i] = at->keys[key + i < at->num ? key + i : at->num - 1];
    int64_t due = 0;  // dims times keys to fetch for what follows
    for (int64_t d = 0; d < dim; d += is_bf16 ? 2 * COLUMNS : COLUMNS) {
        for (due += PANEL * (is_bf16 ? 2 * COLUMNS : COLUMNS); due >= dim && row == work->first_stacked; due -= dim) {
            prefetch(ahead, skip++, 1, dim * (is_bf16 ? 2 : 4));
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            vf x[COLUMNS];
            vf_load_columns(from + half * WIDTH, d * (is_bf16 ? 2 : 4), x);
#pragma GCC unroll 16
            for (int i = 0; i < COLUMNS; i++) {
                if (!is_bf16) {
                    add_dim(rows, sums, half, queries + d + i, dim, x[i]);
                    continue;
                }
                add_dim(rows, sums, half, queries + d + 2 * i, dim, (vf)((vi)x[i] << 16));  // a column has pairs of dims
                add_dim(rows, sums, half, queries + d + 2 * i + 1, dim, (vf)((vi)x[i] & vi_splat((int32_t)0xffff0000)));
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
        float *scores = scratch.scores + (row + i) * SCORES_STRIDE + key;
        vf_store(scores, sums[i][0]);
        vf_store(scores + WIDTH, sums[i][1]);
    }
}

// Sums of the weighted values [begin, end) of the block for `rows` queries and `vectors` vectors of dims.
INLINE void sum_values(const int dtype, const int rows, const int vectors, const Work *work, const Located *at, int begin,
                       int end, const Ahead *ahead, int row, int64_t d) {
    const int64_t offset = value_offset(work->job);
    const float *weights = scratch.scores + row * SCORES_STRIDE;
    float *out = scratch.block_sums + row * work->padded_dim + d;
    vf sums[DIRECT_ROWS][4];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) sums[i][j] = begin ? vf_load(out + i * work->padded_dim + j * WIDTH) : vf_zero();
    }
    for (int key = begin; key < end; key++) {
        const uint8_t *from = at->keys[key] + offset;
        if (row == work->first_stacked && d == 0) prefetch(ahead, key - begin, 1, work->job->head_dim * kv_item_bytes(dtype));
        vf weight[DIRECT_ROWS];
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) weight[i] = vf_splat(weights[i * SCORES_STRIDE + key]);
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) {
            const vf value = load_kv(dtype, from, d + j * WIDTH, vf_zero());
#pragma GCC unroll 4
            for (int i = 0; i < rows; i++) sums[i][j] = vf_fma(weight[i], value, sums[i][j]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) vf_store(out + i * work->padded_dim + j * WIDTH, sums[i][j]);
    }
}

INLINE void sum_rows_directly(const int dtype, const int rows, const Work *work, const Located *at, int begin, int end,
                              const Ahead *ahead, int row) {
    const int most = WIDTH == 8 && rows == DIRECT_ROWS ? 2 : 4;
    int64_t d = 0;
    for (; d + most * WIDTH <= work->job->head_dim; d += most * WIDTH) {
        sum_values(dtype, rows, most, work, at, begin, end, ahead, row, d);
    }
    for (; d < work->job->head_dim; d += 2 * WIDTH) sum_values(dtype, rows, 2, work, at, begin, end, ahead, row, d);
}

#define FOR_ROWS(function, form, rows, ...)             \
    switch (rows) {                                     \
        case 1: function(form, 1, __VA_ARGS__); break;  \
        case 2: function(form, 2, __VA_ARGS__); break;  \
        case 3: function(form, 3, __VA_ARGS__); break;  \
        case 4: function(form, 4, __VA_ARGS__); break;  \
    }

// Scores of the keys [first, first + num) of a block.
static void score_directly(const Work *work, const Located *at, int first, int num, const Ahead *ahead) {
    const int group = direct_rows_for(work->stacked);
    for (int key = first; key < first + num; key += PANEL) {
        for (int row = 0; row < work->stacked; row += group) {
            const int rows = work->stacked - row < group ? work->stacked - row : group;
            if (work->job->kv_dtype == KV_BF16) FOR_ROWS(score_keys, 1, rows, work, at, key, ahead, work->first_stacked + row)
            else FOR_ROWS(score_keys, 0, rows, work, at, key, ahead, work->first_stacked + row)
        }
    }
}

// Sums of the weighted values [first, first + num) of a block.
static void sum_directly(const Work *work, const Located *at, int first, int num, const Ahead *ahead) {
    const int group = direct_rows_for(work->stacked);
    for (int row = 0; row < work->stacked; row += group) {
        const int rows = work->stacked - row < group ? work->stacked - row : group, at_row = work->first_stacked + row;
        switch (work->job->kv_dtype) {
            case KV_F32: FOR_ROWS(sum_rows_directly, KV_F32, rows, work, at, first, first + num, ahead, at_row) break;
            case KV_BF16: FOR_ROWS(sum_rows_directly, KV_BF16, rows, work, at, first, first + num, ahead, at_row) break;
        }
    }
}
