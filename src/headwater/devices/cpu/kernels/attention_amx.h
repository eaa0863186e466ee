// The products of attention on tiles of AMX, for keys and values that bfloat16 holds exactly (those of 8 bits are such).
//
// Queries and weights are float32. Each is split into two bfloat16: its upper half, and what that leaves. So a product is
// the sum of two, and as close to float32's as 16 bits of mantissa are. Sums run over fixed groups of keys and dims, and
// a row of a tile depends on no other row: decodes and prefills give the same bits.

#pragma once

#include "attention_tiles.h"

#if HAS_AMX

// 16 keys as the left-hand side of a product: where they lie, if in a row.
INLINE const void *key_rows(const int dtype, const Work *work, const Located *at, int key, int group, int64_t *stride) {
    const int64_t dim = work->job->head_dim;
    const int last = key + TILE <= at->num ? key + TILE - 1 : at->num - 1;
    *stride = dim * kv_item_bytes(dtype);
    const int is_run = last - key == TILE - 1 && at->keys[last] - at->keys[key] == (TILE - 1) * *stride;
    if (dtype == KV_BF16 && is_run && (group + 1) * GROUP <= dim) return at->keys[key] + group * AMX_BYTES;
    *stride = AMX_BYTES;
    for (int i = 0; i < TILE; i++) {
        const int from = key + i < last ? key + i : last;
        const vf scale = kv_is_scaled(dtype) ? scale_of(*at->exponents[from]) : vf_zero();
        for (int d = 0; d < GROUP; d += 2 * WIDTH) {
            vi_store(tiles.rows[i] + d / 2, load_pairs(dtype, at->keys[from], group * GROUP + d, dim, scale));
        }
    }
    return tiles.rows;
}

// Scores of the keys [first, first + num) against at most 16 queries. The products of tiles are transposed, so that keys
// are taken as they lie; products and the order of sums are those of score_tiles.
INLINE void score_few_of(const int dtype, const Work *work, const Located *at, int first, int num, const Ahead *ahead) {
    int64_t stride;
    for (int key = first; key < first + num; key += GROUP) {
        const int is_two = key + TILE < at->num;
        prefetch(ahead, key - first, GROUP, work->job->head_dim * kv_item_bytes(dtype));
        tile_zero(2);
        tile_zero(3);
        for (int group = 0; group < num_groups(work); group++) {
            const void *keys = key_rows(dtype, work, at, key, group, &stride);
            tile_load(6, keys, stride);
            tile_load(5, tiles.across[2 * group], AMX_BYTES);
            tile_dot_bf16(2, 6, 5);
            tile_load(7, tiles.across[2 * group + 1], AMX_BYTES);
            tile_dot_bf16(2, 6, 7);
            if (!is_two) continue;
            keys = key_rows(dtype, work, at, key + TILE, group, &stride);
            tile_load(6, keys, stride);
            tile_dot_bf16(3, 6, 5);
            tile_dot_bf16(3, 6, 7);
        }
        tile_store(2, tiles.scores, AMX_BYTES);
        tile_store(3, tiles.scores[TILE], AMX_BYTES);
        for (int row = 0; row < work->stacked; row++) {
            float *scores = scratch.scores + row * SCORES_STRIDE + key;
            for (int i = 0; i < GROUP; i++) scores[i] = tiles.scores[i][row];
        }
    }
}

// Scores of the keys [begin, end) against the queries of one or two tiles of rows. Both are multiples of 32.
INLINE void score_tiles(const int num_tiles, const Work *work, int row, int begin, int end) {
    for (int key = begin; key < end; key += GROUP) {
        tile_zero(0);
        tile_zero(1);
        tile_zero(2);
        tile_zero(3);
        for (int group = 0; group < num_groups(work); group++) {
            tile_load(6, key_tile(work, key, group), AMX_BYTES);
            tile_load(7, key_tile(work, key + TILE, group), AMX_BYTES);
            for (int half = 0; half < 2; half++) {
                tile_load(4, query_tile(work, row, group, half), AMX_BYTES);
                tile_dot_bf16(0, 4, 6);
                tile_dot_bf16(1, 4, 7);
                if (num_tiles < 2) continue;
                tile_load(5, query_tile(work, row + TILE, group, half), AMX_BYTES);
                tile_dot_bf16(2, 5, 6);
                tile_dot_bf16(3, 5, 7);
            }
        }
        float *scores = scratch.scores + row * SCORES_STRIDE + key, *more = scores + TILE * SCORES_STRIDE;
        tile_store(0, scores, SCORES_STRIDE * 4);
        tile_store(1, scores + TILE, SCORES_STRIDE * 4);
        if (num_tiles < 2) continue;
        tile_store(2, more, SCORES_STRIDE * 4);
        tile_store(3, more + TILE, SCORES_STRIDE * 4);
    }
}

// Weights of 32 keys in the place of their scores: the upper halves as pairs of the keys i and 16 + i, then the lower.
INLINE void store_weights(float *to, int lane, vf first, vf second) {
    vi_store(to + lane, pair_upper_halves((vi)first, (vi)second));
    vi_store(to + TILE + lane, pair_upper_halves(lower_of(first), lower_of(second)));
}

// Turn one stacked query's scores into pairs of weights; it sees the first `num` keys of the block. The weights of the
// others are zero, up to key `end`.
static void softmax_row_pairs(int row, int64_t num, int64_t end) {
    float *scores = scratch.scores + row * SCORES_STRIDE;
    const float most = largest_score(scores, num);
    const vf subtract = vf_splat(most);
    vf total = vf_zero();
    int64_t key = 0;
    for (; key + GROUP <= num; key += GROUP) {
        for (int lane = 0; lane < TILE; lane += WIDTH) {
            const vf first = vf_exp2(vf_load(scores + key + lane) - subtract);
            const vf second = vf_exp2(vf_load(scores + key + TILE + lane) - subtract);
            store_weights(scores + key, lane, first, second);
            total = total + first + second;
        }
    }
    if (key < num) {
        float weights[GROUP] = {0};
        for (int lane = 0; lane < num - key; lane += WIDTH) {
            const int64_t n = num - key - lane < WIDTH ? num - key - lane : WIDTH;
            vf_store_n(weights + lane, vf_exp2(vf_load_n(scores + key + lane, n) - subtract), n);
        }
        for (int lane = 0; lane < TILE; lane += WIDTH) {
            const vf first = vf_load(weights + lane), second = vf_load(weights + TILE + lane);
            store_weights(scores + key, lane, first, second);
            total = total + first + second;
        }
        key += GROUP;
    }
    if (key < end) memset(scores + key, 0, (size_t)(end - key) * sizeof *scores);
    scratch.block_largest[row] = most;
    scratch.block_total[row] = vf_sum(total);
}

// Add the weighted values of the keys [begin, end) to 32 dims of one or two tiles of rows.
INLINE void sum_tiles(const int num_tiles, const Work *work, int row, int dim_tile, int begin, int end, float *sums) {
    const int64_t stride = work->padded_dim * 4;
    float *more = sums + TILE * work->padded_dim;
    if (begin == 0) {
        tile_zero(0);
        tile_zero(1);
        tile_zero(2);
        tile_zero(3);
    } else {
        tile_load(0, sums, stride);
        tile_load(1, sums + TILE, stride);
        if (num_tiles == 2) tile_load(2, more, stride);
        if (num_tiles == 2) tile_load(3, more + TILE, stride);
    }
    for (int key = begin; key < end; key += GROUP) {
        const float *weights = scratch.scores + row * SCORES_STRIDE + key;
        tile_load(6, value_tile(dim_tile, key), AMX_BYTES);
        tile_load(7, value_tile(dim_tile + 1, key), AMX_BYTES);
        for (int half = 0; half < 2; half++, weights += TILE) {
            tile_load(4, weights, SCORES_STRIDE * 4);
            tile_dot_bf16(0, 4, 6);
            tile_dot_bf16(1, 4, 7);
            if (num_tiles < 2) continue;
            tile_load(5, weights + TILE * SCORES_STRIDE, SCORES_STRIDE * 4);
            tile_dot_bf16(2, 5, 6);
            tile_dot_bf16(3, 5, 7);
        }
    }
    tile_store(0, sums, stride);
    tile_store(1, sums + TILE, stride);
    if (num_tiles == 2) tile_store(2, more, stride);
    if (num_tiles == 2) tile_store(3, more + TILE, stride);
}

// Whether the block's values of the keys [key, key + 32) are all finite.
static int are_values_finite(const Work *work, int key) {
    const vi upper = vi_splat(0x7f800000), lower = vi_splat(0x7f80);
    vi found = {0};
    for (int dim_tile = 0; dim_tile < 2 * num_groups(work); dim_tile++) {
        for (int i = 0; i < TILE * TILE; i += WIDTH) {
            const vi pairs = vi_load(&(*value_tile(dim_tile, key))[0][0] + i);
            found |= ((pairs & upper) == upper) | ((pairs & lower) == lower);
        }
    }
    for (int lane = 0; lane < WIDTH; lane++) {
        if (found[lane]) return 0;
    }
    return 1;
}

// Forget the block's values from key `first` on, up to `end`.
static void clear_values(const Work *work, int64_t first, int64_t end) {
    for (int64_t key = first; key < end; key++) {
        for (int dim_tile = 0; dim_tile < 2 * num_groups(work); dim_tile++) {
            uint32_t *pairs = (*value_tile(dim_tile, (int)key))[key % TILE];
            for (int i = 0; i < TILE; i++) pairs[i] &= key % GROUP < TILE ? 0xffff0000u : 0xffffu;
        }
    }
}

// The weighted values of the keys [begin, end) for a pair of tiles of rows.
static void sum_pair(const Work *work, int row, int begin, int end) {
    for (int dim_tile = 0; dim_tile < 2 * num_groups(work); dim_tile += 2) {
        float *sums = scratch.block_sums + row * work->padded_dim + dim_tile * TILE;
        if (row + TILE < work->stacked) sum_tiles(2, work, row, dim_tile, begin, end, sums);
        else sum_tiles(1, work, row, dim_tile, begin, end, sums);
    }
}

// The same row by row, the last one first: without the values that a row does not see. 0 * NaN is not 0.
static void sum_pair_by_rows(const Work *work, int row, int64_t first, int begin, int end) {
    static _Thread_local float before[PAIR_ROWS * MAX_PADDED_DIM], after[PAIR_ROWS * MAX_PADDED_DIM];
    float *sums = scratch.block_sums + row * work->padded_dim;
    const size_t row_bytes = (size_t)work->padded_dim * sizeof *sums;
    memcpy(before, sums, PAIR_ROWS * row_bytes);
    for (int i = last_of_pair(work, row) - row; i >= 0; i--) {
        const int64_t visible = visible_keys(work, row + i, first);
        clear_values(work, visible > begin ? visible : begin, end);
        memcpy(sums, before, PAIR_ROWS * row_bytes);
        sum_pair(work, row, begin, end);
        memcpy(after + i * work->padded_dim, sums + i * work->padded_dim, row_bytes);
    }
    memcpy(sums, after, PAIR_ROWS * row_bytes);
}

// Add the values of the keys [begin, end) to a pair's sums. What only later queries see may be anything.
static void sum_visible(const Work *work, int row, int64_t first, int begin, int end) {
    const int64_t all_see = visible_keys(work, row, first), seen = visible_keys(work, last_of_pair(work, row), first);
    int is_finite = 1;
    for (int key = (int)(all_see / GROUP) * GROUP; key < seen; key += GROUP) {
        if (key >= begin && key < end && all_see < seen) is_finite &= are_values_finite(work, key);
    }
    if (is_finite) sum_pair(work, row, begin, end);
    else sum_pair_by_rows(work, row, first, begin, end);
}

static void score_pair(const Work *work, int row, int begin, int end) {
    if (row + TILE < work->stacked) score_tiles(2, work, row, begin, end);
    else score_tiles(1, work, row, begin, end);
}

static void softmax_pair(const Work *work, int row, int64_t first, int64_t end) {
    for (int i = row; i <= last_of_pair(work, row); i++) softmax_row_pairs(i, visible_keys(work, i, first), end);
}

static void score_few(const Work *work, const Located *at, int first, int num, const Ahead *ahead) {
    FOR_DTYPE(score_few_of, work, at, first, num, ahead)
}

static void pack_key_tiles(const Work *work, const Located *at, int first, int num, const Ahead *ahead) {
    FOR_DTYPE(pack_key_tiles_of, work, at, first, num, ahead)
}

static void pack_value_tiles(const Work *work, const Located *at, int first, int num, const Ahead *ahead) {
    FOR_DTYPE(pack_value_tiles_of, work, at, first, num, ahead)
}

// Sums of a block in the order of their dims.
static void order_dims(const Work *work) {
    for (int row = 0; row < work->stacked; row++) {
        float *sums = scratch.block_sums + row * work->padded_dim, group[GROUP];
        for (int64_t d = 0; d < work->padded_dim; d += GROUP) {
            memcpy(group, sums + d, sizeof group);
            for (int i = 0; i < TILE; i++) {
                sums[d + 2 * i] = group[i];
                sums[d + 2 * i + 1] = group[TILE + i];
            }
        }
    }
}

// The result of the block that begins at key `first`, into scratch.block_*. The block after it is `next`. A few queries
// are computed while keys and values arrive from memory. Many keep the scores of two tiles in the first cache.
static void attend_block_in_tiles(const Work *work, const Located *at, const Located *next, int64_t first) {
    const int size = work->part_keys, is_one_tile = work->stacked <= TILE, end = (int)up_to(GROUP, at->num);
    for (int part = 0; part < at->num; part += size) {
        const int num = at->num - part < size ? at->num - part : size;
        const Ahead ahead = ahead_of(work, at, next, part, 0);
        if (is_one_tile) score_few(work, at, part, num, &ahead);
        else pack_key_tiles(work, at, part, num, &ahead);
    }
    if (is_one_tile) softmax_pair(work, 0, first, end);
    for (int part = 0; part < at->num; part += size) {
        const int num = at->num - part < size ? at->num - part : size;
        const Ahead ahead = ahead_of(work, at, next, part, 1);
        pack_value_tiles(work, at, part, num, &ahead);
        if (is_one_tile) sum_visible(work, 0, first, part, part + (int)up_to(GROUP, num));
    }
    for (int row = is_one_tile ? -1 : (work->stacked - 1) / PAIR_ROWS * PAIR_ROWS; row >= 0; row -= PAIR_ROWS) {
        const int seen = (int)up_to(GROUP, visible_keys(work, last_of_pair(work, row), first));
        if (seen == 0) break;
        score_pair(work, row, 0, seen);
        softmax_pair(work, row, first, seen);
        sum_visible(work, row, first, 0, seen);
    }
    order_dims(work);
}

#endif
