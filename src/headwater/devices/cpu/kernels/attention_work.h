// What attention.c works on: a chunk's queries and keys, where they lie, and a thread's scratch memory.

#pragma once

#include "attention.h"
#include "attention_tile.h"
#include "kv_pages.h"
#include "simd_amx.h"

// Many stacked queries make use of a part that fills the first cache. With few of them memory must not wait for
// arithmetic: parts are so small that what is on its way from memory lasts while one is multiplied.
#define PADDING (HAS_AMX ? 32 : PANEL)  // of the dims of sums, and of the keys of small parts
enum { MAX_PART_KEYS = 64, SMALL_PART_KEYS = PADDING, FEW_STACKED = 16 };
enum { MAX_PADDED_DIM = (MAX_HEAD_DIM + PADDING - 1) / PADDING * PADDING };

// Rows of scratch memory are a line further apart than powers of two: else they fall on the same few lines of the cache.
enum { SCORES_STRIDE = BLOCK_KEYS + 16, VALUES_STRIDE = PANEL * (MAX_PART_KEYS + 1) };

typedef struct {
    _Alignas(64) float queries[MAX_STACKED * MAX_HEAD_DIM];       // [stacked][dim], scaled
    _Alignas(64) float keys[MAX_PART_KEYS * (MAX_HEAD_DIM + 1)];      // [part / PANEL][dim + 1][PANEL]
    _Alignas(64) float values[MAX_PADDED_DIM / PANEL * VALUES_STRIDE];  // [padded / PANEL][MAX_PART_KEYS + 1][PANEL]
    _Alignas(64) float scores[MAX_STACKED * SCORES_STRIDE];       // [stacked][BLOCK_KEYS and a line]; then the softmax's weights
    _Alignas(64) float block_sums[MAX_STACKED * MAX_PADDED_DIM];  // [stacked][padded]
    _Alignas(64) float sums[MAX_STACKED * MAX_HEAD_DIM];          // [stacked][dim], of all blocks so far
    float block_largest[MAX_STACKED], block_total[MAX_STACKED];
    float largest[MAX_STACKED], total[MAX_STACKED];
} Scratch;

static _Thread_local Scratch scratch;

INLINE int64_t keys_stride(int64_t dim) { return PANEL * (dim + 1); }

// Some queries of one row and one KV head, with the keys they see.
typedef struct {
    const AttentionJob *job;
    int64_t head, per_kv, padded_dim;
    int64_t first_token, first_position, num_keys;
    int stacked;
    int part_keys;                          // keys that are packed at a time, at most MAX_PART_KEYS
    int64_t block;                          // of a split row: the only one to compute; else -1
    int64_t first_slot, blocks_of_row;      // of a split row
    int num_rows, rows[MAX_SHARING];        // that share the block; the queries of the others lie in a run
    int num_common;                         // keys of the block that they share; what follows is each row's own
    int first_stacked;                      // where scratch memory has the queries
    int in_tiles;                           // of AMX, if the dtype of keys and values is for it
    const int32_t *pages;
    const Step *step;
} Work;

// Where a block's keys lie, and their exponents if the pages have some.
typedef struct {
    const uint8_t *keys[BLOCK_KEYS];
    const int8_t *exponents[BLOCK_KEYS];
    int num;
} Located;

// The token of one of the stacked queries.
INLINE int64_t token_of(const Work *work, int64_t query) {
    return work->num_rows > 1 ? work->step->query_starts[work->rows[query]] : work->first_token + query;
}

// The first key that a stacked query sees.
INLINE int64_t lowest_key(const Work *work, int64_t stacked) {
    if (!work->job->window) return 0;
    const int64_t query = stacked / work->per_kv;
    const int64_t position =
        work->num_rows > 1 ? work->step->context_lens[work->rows[query]] - 1 : work->first_position + query;
    return position < work->job->window ? 0 : position + 1 - work->job->window;
}

// How many keys of the block that begins at `first`, its first ones, lie before the window of a stacked query.
INLINE int64_t hidden_keys(const Work *work, int64_t stacked, int64_t first) {
    const int64_t hidden = lowest_key(work, stacked) - first;
    return hidden < 0 ? 0 : hidden > BLOCK_KEYS ? BLOCK_KEYS : hidden;
}

// The fewest such keys of all stacked queries, or the most.
static inline int64_t hidden_from_all(const Work *work, int64_t first) {
    int64_t least = work->job->window ? BLOCK_KEYS : 0;
    for (int row = 0; least && row < work->stacked; row++) {
        const int64_t hidden = hidden_keys(work, row, first);
        least = hidden < least ? hidden : least;
    }
    return least;
}

static inline int64_t hidden_from_any(const Work *work, int64_t first) {
    int64_t most = 0;
    for (int row = 0; work->job->window && row < work->stacked; row++) {
        const int64_t hidden = hidden_keys(work, row, first);
        most = hidden > most ? hidden : most;
    }
    return most;
}

// How many keys of the block that begins at `first` come before the first one that a stacked query does not see yet.
INLINE int64_t visible_keys(const Work *work, int64_t stacked, int64_t first) {
    const int64_t query = work->num_rows > 1 ? 0 : stacked / work->per_kv;
    const int64_t visible = work->first_position + query + 1 - first;
    return visible < 0 ? 0 : visible > BLOCK_KEYS ? BLOCK_KEYS : visible;
}

// The same for a part of `num` keys that begins at key `part` of the block.
INLINE int64_t visible_in_part(const Work *work, int64_t stacked, int64_t first, int part, int num) {
    const int64_t visible = visible_keys(work, stacked, first) - part;
    return visible < 0 ? 0 : visible > num ? num : visible;
}

// Whether a stacked query sees a key of the block.
INLINE int sees_some(const Work *work, int64_t stacked, int64_t first) {
    return visible_keys(work, stacked, first) > hidden_keys(work, stacked, first);
}

// How many keys of a part lie before the window of a stacked query.
INLINE int64_t hidden_in_part(const Work *work, int64_t stacked, int64_t first, int part, int num) {
    const int64_t hidden = hidden_keys(work, stacked, first) - part;
    return hidden < 0 ? 0 : hidden > num ? num : hidden;
}

// The keys of the block that begins at `first`, without its first `skip` ones.
static inline void locate(const Work *work, int64_t first, int skip, Located *at) {
    const AttentionJob *job = work->job;
    const int64_t left = work->num_keys - first, key_bytes = job->head_dim * kv_item_bytes(job->kv_dtype);
    int64_t page = (first + skip) / job->page_size, offset = (first + skip) % job->page_size;
    at->num = (int)(left < 0 ? 0 : left < BLOCK_KEYS ? left : BLOCK_KEYS);
    for (int i = skip; i < at->num; page++, offset = 0) {
        uint8_t *start = page_of(job, work->step, work->pages[page]);
        const uint8_t *key = key_at(job, start, work->head, offset);
        const int8_t *exponent = exponent_at(job, start, work->head, offset);
        for (; offset < job->page_size && i < at->num; offset++, i++, key += key_bytes) {
            at->keys[i] = key;
            at->exponents[i] = exponent++;
        }
    }
}

// Keys from `first` on that will be needed soon, or their values, `offset` bytes further.
typedef struct {
    const Located *at;
    int first;
    int64_t offset;
} Ahead;

INLINE void prefetch(const Ahead *ahead, int skip, int num, int64_t key_bytes) {
    for (int i = ahead->first + skip; i < ahead->first + skip + num && i < ahead->at->num; i++) {
        const uint8_t *from = ahead->at->keys[i] + ahead->offset;
        for (int64_t byte = 0; byte < key_bytes; byte += 64) __builtin_prefetch(from + byte, 0, 3);
    }
}

// What to fetch while the keys (or values) from `part` on are computed: what is used two parts later. The values of a
// block follow its keys, and the next block's keys its values.
static inline Ahead ahead_of(const Work *work, const Located *at, const Located *next, int part, int is_values) {
    const int first = part + 2 * work->part_keys, parts_end = (at->num + work->part_keys - 1) / work->part_keys * work->part_keys;
    const int64_t to_value = value_offset(work->job);
    if (first < parts_end) return (Ahead){at, first, is_values ? to_value : 0};
    return is_values ? (Ahead){next, first - parts_end, 0} : (Ahead){at, first - parts_end, to_value};
}

// Windows are left to vectors: masks of tiles know only what comes after a query.
INLINE int is_for_tiles(const AttentionJob *job) {
    return HAS_AMX && !job->window && (job->kv_dtype == KV_BF16 || kv_is_scaled(job->kv_dtype));
}

static inline Work open_work(const AttentionJob *job, const Step *step, int64_t chunk, int64_t head) {
    const int64_t row = chunk >> 32 & 0xffff, first_query = chunk & 0xffffffff, start = step->query_starts[row];
    const int64_t num_queries = step->query_starts[row + 1] - start, left = num_queries - first_query;
    const int64_t queries = left < step->queries_per_chunk ? left : step->queries_per_chunk;
    const int64_t per_kv = job->num_heads / job->num_kv_heads;
    const int64_t first_position = step->context_lens[row] - num_queries + first_query;
    const int64_t blocks_of_row = (step->context_lens[row] + BLOCK_KEYS - 1) / BLOCK_KEYS;
    return (Work){
        .job = job,
        .head = head,
        .per_kv = per_kv,
        .padded_dim = (job->head_dim + PADDING - 1) / PADDING * PADDING,
        .first_token = start + first_query,
        .first_position = first_position,
        .num_keys = first_position + queries,
        .stacked = (int)(queries * per_kv),
        .part_keys = queries * per_kv <= FEW_STACKED ? SMALL_PART_KEYS : MAX_PART_KEYS,
        .block = (chunk >> 48 & 0x7fff) - 1,
        .first_slot = step->partial_slots[row] + first_query * blocks_of_row,
        .blocks_of_row = blocks_of_row,
        .num_rows = 1,
        .rows = {(int)row},
        .in_tiles = is_for_tiles(job),
        .pages = step->page_tables + row * step->table_stride,
        .step = step,
    };
}

// The same for a block that rows share: all their queries are stacked, and all see what is common.
static inline Work open_shared(const AttentionJob *job, const Step *step, int64_t chunk, int64_t head) {
    Work work = open_work(job, step, chunk & ~(int64_t)0xffffffff, head);
    work.num_common = (int)(chunk & 0xffffffff);
    for (int row = step->next_sharing[work.rows[0]]; row >= 0; row = step->next_sharing[row]) {
        work.rows[work.num_rows++] = row;
    }
    work.stacked = (int)(work.num_rows * work.per_kv);
    work.part_keys = work.stacked <= FEW_STACKED ? SMALL_PART_KEYS : MAX_PART_KEYS;
    return work;
}

// One of the rows that share a block.
static inline Work open_row_of(const Work *shared, int i) {
    Work work = open_work(shared->job, shared->step, (int64_t)shared->rows[i] << 32, shared->head);
    work.block = shared->block;
    work.first_stacked = (int)(i * work.per_kv);
    return work;
}

// Call `function` with the dtype of the keys and values as a constant.
#define FOR_DTYPE(function, ...)                                        \
    switch (work->job->kv_dtype) {                                      \
        case KV_F32: function(KV_F32, __VA_ARGS__); break;              \
        case KV_BF16: function(KV_BF16, __VA_ARGS__); break;            \
        case KV_F16: function(KV_F16, __VA_ARGS__); break;              \
        case KV_E4M3: function(KV_E4M3, __VA_ARGS__); break;            \
        case KV_E5M2: function(KV_E5M2, __VA_ARGS__); break;            \
    }
