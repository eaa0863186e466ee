// Queries, keys and values of attention in tiles of AMX, as pairs of bfloat16.

#pragma once

#include "attention_work.h"

#if HAS_AMX

enum { TILE = 16, GROUP = 32 };  // rows or columns of a tile of sums; numbers that one product of tiles adds up
enum { PAIR_ROWS = 2 * TILE };   // stacked queries that are computed together
enum { MAX_TILES = MAX_HEAD_DIM / TILE, MAX_GROUPS = MAX_HEAD_DIM / GROUP };

typedef uint32_t Pairs[TILE][TILE];  // a tile of pairs of bfloat16

static _Thread_local struct {
    _Alignas(64) Pairs queries[MAX_STACKED / TILE * MAX_GROUPS * 2];  // [stacked / 16][dim / 32][upper, lower]
    _Alignas(64) Pairs across[MAX_GROUPS * 2];                        // [dim / 32][upper, lower]: of at most 16, transposed
    _Alignas(64) Pairs rows;                                          // of keys that lie apart
    _Alignas(64) float scores[2 * TILE][TILE];                        // [key][query]
    _Alignas(64) Pairs keys[BLOCK_KEYS / TILE * MAX_GROUPS];          // [key / 16][dim / 32]: pairs of dims of 16 keys
    _Alignas(64) Pairs values[MAX_TILES * BLOCK_KEYS / GROUP];        // [dim / 16][key / 32]: pairs of keys, 16 dims of 32
} tiles;

INLINE int64_t up_to(int64_t multiple, int64_t x) { return (x + multiple - 1) / multiple * multiple; }

INLINE int last_of_pair(const Work *work, int row) {
    return (work->stacked - row < PAIR_ROWS ? work->stacked : row + PAIR_ROWS) - 1;
}

INLINE int num_groups(const Work *work) { return (int)up_to(GROUP, work->job->head_dim) / GROUP; }

INLINE Pairs *query_tile(const Work *work, int row, int group, int half) {
    return tiles.queries + (row / TILE * num_groups(work) + group) * 2 + half;
}

INLINE Pairs *key_tile(const Work *work, int key, int group) { return tiles.keys + key / TILE * num_groups(work) + group; }

INLINE Pairs *value_tile(int dim_tile, int key) { return tiles.values + dim_tile * (BLOCK_KEYS / GROUP) + key / GROUP; }

static void configure_tiles(const Work *work) {
    const uint8_t rows = (uint8_t)(work->stacked < TILE ? work->stacked : TILE);  // fewer rows take less time
    TileConfig config = {.palette = 1};
    for (int t = 0; t < NUM_TILES; t++) {
        // sums are 0 to 3, queries or weights 4 and 5; at most 16 queries need 0, 1 and 4 of these
        config.rows[t] = t < 2 || t == 4 || (t < 6 && work->stacked > TILE) ? rows : TILE;
        config.row_bytes[t] = AMX_BYTES;
    }
    tiles_configure(&config);
}

// What the upper half of each lane leaves, its own upper half rounded.
INLINE vi lower_of(vf x) { return (vi)(x - (vf)((vi)x & vi_splat((int32_t)0xffff0000))) + vi_splat(0x8000); }

INLINE vi pair_upper_halves(vi first, vi second) {
    return (vi)((vu)first >> 16) | (second & vi_splat((int32_t)0xffff0000));
}

// A stacked query, scaled. Behind its last dim it is zero.
static void store_query(const Work *work, int row, const float *head, vf scale) {
    const int64_t dim = work->job->head_dim;
    for (int64_t d = 0; d < up_to(GROUP, dim); d += WIDTH) {
        const int64_t left = dim - d;
        const vf x = left <= 0 ? vf_zero() : vf_load_n(head + d, left < WIDTH ? left : WIDTH) * scale;
        const int group = (int)(d / GROUP);
        vi_store_16((uint16_t *)(*query_tile(work, row, group, 0))[row % TILE] + d % GROUP, (vi)((vu)x >> 16));
        vi_store_16((uint16_t *)(*query_tile(work, row, group, 1))[row % TILE] + d % GROUP, (vi)((vu)lower_of(x) >> 16));
    }
}

// WIDTH pairs of dims of a key from d on, zero behind the last one.
INLINE vi load_pairs(const int dtype, const uint8_t *from, int64_t d, int64_t dim, vf scale) {
    if (dtype == KV_BF16 && d + 2 * WIDTH <= dim) return vi_load(from + d * 2);
    uint16_t padded[2 * WIDTH] = {0};
    for (int64_t at = d; at < dim && at < d + 2 * WIDTH; at += WIDTH) {
        const vf x = dim - at < WIDTH ? load_kv_n(dtype, from, at, dim - at, scale) : load_kv(dtype, from, at, scale);
        vi_store_16(padded + at - d, (vi)((vu)x >> 16));
    }
    return vi_load(padded);
}

// The queries as the right-hand side of a product of tiles.
static void transpose_queries(const Work *work) {
    for (int t = 0; t < 2 * num_groups(work); t++) {
        for (int row = 0; row < work->stacked; row++) {
            for (int pair = 0; pair < TILE; pair++) tiles.across[t][pair][row] = tiles.queries[t][row][pair];
        }
    }
}

// Keys [first, first + num) of a block; missing ones of a group of 32 repeat the last.
INLINE void pack_key_tiles_of(const int dtype, const Work *work, const Located *at, int first, int num, const Ahead *ahead) {
    const int64_t dim = work->job->head_dim;
    for (int key = first; key < first + up_to(GROUP, num); key += WIDTH) {
        const uint8_t *from[WIDTH];
        vf scales[WIDTH], x[WIDTH];
        for (int i = 0; i < WIDTH; i++) {
            const int at_key = key + i < first + num ? key + i : first + num - 1;
            from[i] = at->keys[at_key];
            scales[i] = kv_is_scaled(dtype) ? scale_of(*at->exponents[at_key]) : vf_zero();
        }
        prefetch(ahead, key - first, WIDTH, dim * kv_item_bytes(dtype));
        for (int64_t d = 0; d < up_to(GROUP, dim); d += 2 * WIDTH) {
            for (int i = 0; i < WIDTH; i++) x[i] = (vf)load_pairs(dtype, from[i], d, dim, scales[i]);
            vf_transpose(x);
            uint32_t *to = (*key_tile(work, key, (int)(d / GROUP)))[d % GROUP / 2] + key % TILE;
            for (int i = 0; i < WIDTH; i++) vf_store((float *)to + i * TILE, x[i]);
        }
    }
}

// WIDTH pairs of dims of a value of the block from d on; zero behind the last dim, and of keys that the block has not.
INLINE vi load_value(const int dtype, const Work *work, const Located *at, int key, int64_t d) {
    if (key >= at->num) return (vi){0};
    const int64_t exponent_offset = work->job->num_kv_heads * work->job->page_size;
    const vf scale = kv_is_scaled(dtype) ? scale_of(at->exponents[key][exponent_offset]) : vf_zero();
    return load_pairs(dtype, at->keys[key] + value_offset(work->job), d, work->job->head_dim, scale);
}

// Values [first, first + num) of a block. Nothing is shuffled: the second key of a pair lies 16 further, and of 32 dims
// the first tile has the even ones and the second the odd ones.
INLINE void pack_value_tiles_of(const int dtype, const Work *work, const Located *at, int first, int num, const Ahead *ahead) {
    const int64_t dim = work->job->head_dim;
    for (int group = first; group < first + num; group += GROUP) {
        for (int i = 0; i < TILE; i++) {
            prefetch(ahead, group - first + 2 * i, 2, dim * kv_item_bytes(dtype));
            for (int64_t d = 0; d < up_to(GROUP, dim); d += 2 * WIDTH) {
                const vi one = load_value(dtype, work, at, group + i, d);
                const vi other = load_value(dtype, work, at, group + TILE + i, d);
                Pairs *even = value_tile((int)(d / GROUP) * 2, group), *odd = value_tile((int)(d / GROUP) * 2 + 1, group);
                vi_store((*even)[i] + d % GROUP / 2, (one & vi_splat(0xffff)) | (vi)((vu)other << 16));
                vi_store((*odd)[i] + d % GROUP / 2, pair_upper_halves(one, other));
            }
        }
    }
}



#endif
