// Queries, keys and values of attention in tiles of AMX, as pairs of bfloat16.
//
// Scores are [key][query]: keys lie in pages as a left-hand side does, the softmax of 16 queries runs down the lanes of
// a vector, and a pair of rows of weights is a row of the next right-hand side. Only values are transposed.

#pragma once

#include "attention_work.h"

#if HAS_AMX

enum { TILE = 16, GROUP = 32 };  // rows or columns of a tile of sums; numbers that one product of tiles adds up
enum { QUERY_TILES = MAX_STACKED / TILE, DIM_TILES = MAX_HEAD_DIM / TILE, DIM_GROUPS = MAX_HEAD_DIM / GROUP };
enum { PASS_KEYS = 256 };  // of a block; with fewer, a pass works in a smaller part of the cache
enum { KEY_TILES = PASS_KEYS / TILE, KEY_GROUPS = PASS_KEYS / GROUP };

enum { ALL_KEYS = 1 << 30 };   // of a block that rows share

typedef uint32_t Pairs[TILE][TILE];  // a tile of pairs of bfloat16
typedef float Floats[TILE][TILE];

// Of 16 queries: weighted sums of values, and what the softmax needs to go on.
typedef struct {
    _Alignas(64) Floats dims[DIM_TILES];  // [dim][query]
    _Alignas(64) float largest[TILE], total[TILE];
} Sums;

typedef struct {
    _Alignas(64) Pairs queries[QUERY_TILES][DIM_GROUPS];  // [pair of dims][query]
    _Alignas(64) Pairs keys[KEY_TILES][DIM_GROUPS];       // [key][pair of dims], where pages do not hold them so
    _Alignas(64) Pairs values[KEY_GROUPS][DIM_TILES];     // [dim][pair of keys]
    // [key][query], of two tiles of queries; 2 KiB apart in the addresses of the first cache: one is written while the
    // other is read
    _Alignas(64) Floats scores[2][KEY_TILES + 2];
    _Alignas(64) Pairs weights[KEY_GROUPS];               // [pair of keys][query]
    Sums pass;                                            // of the keys of one pass
    Sums block[QUERY_TILES], all[QUERY_TILES];            // of a block, and of all blocks so far
    _Alignas(64) int32_t seen[QUERY_TILES][TILE];         // how many keys of its sequence each query sees
} Tiles;

static _Thread_local Tiles tile_scratch;

INLINE int64_t up_to(int64_t multiple, int64_t x) { return (x + multiple - 1) / multiple * multiple; }

INLINE int num_dim_groups(const Work *work) { return (int)up_to(GROUP, work->job->head_dim) / GROUP; }

INLINE int num_query_tiles(const Work *work) { return (work->stacked + TILE - 1) / TILE; }

static void configure_tiles(void) {
    TileConfig config = {.palette = 1};
    for (int t = 0; t < NUM_TILES; t++) config.rows[t] = TILE, config.row_bytes[t] = AMX_BYTES;
    tiles_configure(&config);
}

// Pairs of bfloat16 of the upper halves of lanes.
INLINE vi pair_upper_halves(vi first, vi second) {
    return (vi)((vu)first >> 16) | (second & vi_splat((int32_t)0xffff0000));
}

INLINE vi pair_lower_halves(vi first, vi second) { return (first & vi_splat(0xffff)) | (vi)((vu)second << 16); }

static void transpose_tile(const void *from, void *to) {
    for (int row = 0; row < TILE; row += WIDTH) {
        for (int col = 0; col < TILE; col += WIDTH) {
            vf x[WIDTH];
            for (int i = 0; i < WIDTH; i++) x[i] = vf_load((const float *)from + (row + i) * TILE + col);
            vf_transpose(x);
            for (int i = 0; i < WIDTH; i++) vf_store((float *)to + (col + i) * TILE + row, x[i]);
        }
    }
}

// Zeros behind the last query, which see what it sees, and behind the last dim.
static void stack_tiles(const Work *work, Tiles *tiles) {
    const AttentionJob *job = work->job;
    const int64_t dim = job->head_dim;
    const vf scale = vf_splat(job->scale * LOG2_E);
    for (int row = 0; row < num_query_tiles(work) * TILE; row++) {
        const int64_t query = (row < work->stacked ? row : work->stacked - 1) / work->per_kv;
        const int64_t seen = work->num_rows > 1 ? ALL_KEYS : work->first_position + query + 1;
        tiles->seen[row / TILE][row % TILE] = (int32_t)seen;
    }
    for (int row = 0; row < work->stacked; row += TILE) {
        for (int group = 0; group < num_dim_groups(work); group++) {
            Pairs rows = {0};
            for (int i = 0; i < TILE && row + i < work->stacked; i++) {
                const int64_t token = token_of(work, (row + i) / work->per_kv);
                const int64_t head = work->head * work->per_kv + (row + i) % work->per_kv;
                const float *from = job->qkv + token * qkv_stride(job) + head * dim;
                for (int64_t d = group * GROUP; d < (group + 1) * GROUP && d < dim; d += WIDTH) {
                    const vf x = vf_load_n(from + d, dim - d < WIDTH ? dim - d : WIDTH) * scale;
                    vf_store_bf16((bf16 *)rows[i] + d % GROUP, x);
                }
            }
            transpose_tile(rows, tiles->queries[row / TILE][group]);
        }
    }
}

// WIDTH pairs of dims of a key or value from d on, zero behind the last one.
INLINE vi load_pairs(const int dtype, const uint8_t *from, int64_t d, int64_t dim, vf scale) {
    if (dtype == KV_BF16 && d + 2 * WIDTH <= dim) return vi_load(from + d * 2);
    uint16_t padded[2 * WIDTH] = {0};
    for (int64_t at = d; at < dim && at < d + 2 * WIDTH; at += WIDTH) {
        const vf x = dim - at < WIDTH ? load_kv_n(dtype, from, at, dim - at, scale) : load_kv(dtype, from, at, scale);
        vi_store_16(padded + at - d, (vi)((vu)x >> 16));
    }
    return vi_load(padded);
}

// Whether pages hold 16 keys as a tile: 16 rows of dims. Those behind the last key may be anything.
INLINE int are_keys_in_place(const AttentionJob *job) {
    return job->kv_dtype == KV_BF16 && job->head_dim % GROUP == 0 && job->page_size % TILE == 0;
}

INLINE void copy_key_of(const int dtype, const Work *work, const Located *at, int key, int to_key, Tiles *tiles) {
    const int64_t dim = work->job->head_dim;
    const vf scale = kv_is_scaled(dtype) ? scale_of(*at->exponents[key]) : vf_zero();
    for (int64_t d = 0; d < up_to(GROUP, dim); d += 2 * WIDTH) {
        uint32_t *to = tiles->keys[to_key / TILE][d / GROUP][to_key % TILE];
        vi_store(to + d % GROUP / 2, load_pairs(dtype, at->keys[key], d, dim, scale));
    }
}

static void copy_key(const Work *work, const Located *at, int key, int to_key, Tiles *tiles) {
    FOR_DTYPE(copy_key_of, work, at, key, to_key, tiles)
}

// WIDTH pairs of dims of a value of the block from d on; zero behind the last dim, and of keys that the block has not.
INLINE vi load_value(const int dtype, const Work *work, const Located *at, int key, int64_t d) {
    if (key >= at->num) return (vi){0};
    const int64_t exponent_offset = work->job->num_kv_heads * work->job->page_size;
    const vf scale = kv_is_scaled(dtype) ? scale_of(at->exponents[key][exponent_offset]) : vf_zero();
    return load_pairs(dtype, at->keys[key] + value_offset(work->job), d, work->job->head_dim, scale);
}

// WIDTH pairs of keys from `key` on, of the dims from d on: those of the lower halves and of the upper ones.
INLINE void load_value_pairs(
    const int dtype, const Work *work, const Located *at, int key, int64_t d, vf even[WIDTH], vf odd[WIDTH]) {
    const int64_t offset = value_offset(work->job) + d * 2;
    const int is_plain = dtype == KV_BF16 && d + 2 * WIDTH <= work->job->head_dim && key + 2 * WIDTH <= at->num;
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++, key += 2) {
        const vi first = is_plain ? vi_load(at->keys[key] + offset) : load_value(dtype, work, at, key, d);
        const vi second = is_plain ? vi_load(at->keys[key + 1] + offset) : load_value(dtype, work, at, key + 1, d);
        even[i] = (vf)pair_lower_halves(first, second), odd[i] = (vf)pair_upper_halves(first, second);
    }
}

INLINE void pack_value_tiles_of(
    const int dtype, const Work *work, const Located *at, int first, int group, Tiles *tiles) {
    for (int pair = 0; pair < TILE; pair += WIDTH) {
        for (int64_t d = 0; d < num_dim_groups(work) * GROUP; d += 2 * WIDTH) {
            vf even[WIDTH], odd[WIDTH];
            load_value_pairs(dtype, work, at, first + group * GROUP + 2 * pair, d, even, odd);
            vf_transpose(even);
            vf_transpose(odd);
            float *to = (float *)tiles->values[group][0] + d * TILE + pair;  // tiles of dims follow each other
            for (int i = 0; i < WIDTH; i++) {
                vf_store(to + 2 * i * TILE, even[i]);
                vf_store(to + (2 * i + 1) * TILE, odd[i]);
            }
        }
    }
}

// Values of a group of the keys from `first` of the block on.
static void pack_value_tiles(const Work *work, const Located *at, int first, int group, Tiles *tiles) {
    FOR_DTYPE(pack_value_tiles_of, work, at, first, group, tiles)
}

#endif
