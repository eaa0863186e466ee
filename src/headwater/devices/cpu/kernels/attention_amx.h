// Attention in tiles of AMX. Queries, keys, values and weights are bfloat16, scores and sums float32.
//
// Tiles of 16 queries pass one after another through a block of keys. While one turns its scores into weights and adds
// up values, the scores of the next one are computed: products of tiles and vectors run side by side.

#pragma once

#include "allowed.h"
#include "attention_tiles.h"

#if HAS_AMX

// A tile of queries and the keys of a block that it passes through.
typedef struct {
    const Work *work;
    const Located *at;   // the block's keys
    int begin, num;      // those of the pass
    int64_t first;       // position of the first one
    int query_tile;      // -1: none
    int groups;          // of keys that some query sees
    int whole_groups;    // that all queries see
    int dim_groups;
    Floats *scores;
    Sums *sums;          // the result: of the first pass, the block's so far
    Tiles *tiles;        // this thread's
} Pass;

INLINE int within(int64_t x, int most) { return x < 0 ? 0 : x < most ? (int)x : most; }

// The same keys for another tile of queries.
static Pass pass_of(const Pass *other, int query_tile) {
    Pass pass = *other;
    pass.query_tile = query_tile;
    pass.scores = pass.tiles->scores[query_tile & 1];
    pass.groups = pass.whole_groups = 0;
    if (query_tile < 0) return pass;
    pass.sums = pass.begin == 0 ? &pass.tiles->block[query_tile] : &pass.tiles->pass;
    const int32_t *seen = pass.tiles->seen[query_tile];
    pass.whole_groups = within(seen[0] - pass.first, pass.num) / GROUP;
    pass.groups = (within(seen[TILE - 1] - pass.first, pass.num) + GROUP - 1) / GROUP;
    return pass;
}

// How many keys from the pass's first on each query of some lanes sees; below 1: none.
INLINE vi seen_by(const Pass *pass, int lane) {
    return vi_load(pass->tiles->seen[pass->query_tile] + lane) - vi_splat((int32_t)pass->first);
}

// Where a tile of keys lies. Behind the pass's last key it is any that may be read.
INLINE const uint8_t *keys_of(const Pass *pass, int tile) {
    const int key = tile * TILE < pass->num ? tile * TILE : 0;
    return are_keys_in_place(pass->work->job) ? pass->at->keys[pass->begin + key]
                                              : (const uint8_t *)pass->tiles->keys[key / TILE];
}

// The scores of two groups of keys, or of one: up to four tiles, which share what is loaded of the queries.
INLINE void score_groups(const Pass *pass, int group, int num) {
    const AttentionJob *job = pass->work->job;
    const int in_place = are_keys_in_place(job), part_bytes = in_place ? AMX_BYTES : (int)sizeof(Pairs);
    const int64_t stride = in_place ? job->head_dim * 2 : AMX_BYTES;
    const uint8_t *const keys[4] = {
        keys_of(pass, 2 * group), keys_of(pass, 2 * group + 1), keys_of(pass, 2 * group + 2), keys_of(pass, 2 * group + 3)};
    tile_zero(4);
    tile_zero(5);
    tile_zero(6);
    tile_zero(7);
    for (int part = 0; part < pass->dim_groups; part++) {
        tile_load(0, pass->tiles->queries[pass->query_tile][part], AMX_BYTES);
        tile_load(1, keys[0] + part * part_bytes, stride);
        tile_dot_bf16(4, 1, 0);
        tile_load(2, keys[1] + part * part_bytes, stride);
        tile_dot_bf16(5, 2, 0);
        if (num == 1) continue;
        tile_load(3, keys[2] + part * part_bytes, stride);
        tile_dot_bf16(6, 3, 0);
        tile_load(1, keys[3] + part * part_bytes, stride);
        tile_dot_bf16(7, 1, 0);
    }
    tile_store(4, pass->scores[2 * group], AMX_BYTES);
    tile_store(5, pass->scores[2 * group + 1], AMX_BYTES);
    if (num == 1) return;
    tile_store(6, pass->scores[2 * group + 2], AMX_BYTES);
    tile_store(7, pass->scores[2 * group + 3], AMX_BYTES);
}

INLINE void score_some(const Pass *pass, int group) {
    if (group + 1 < pass->groups) score_groups(pass, group, 2);
    else if (group < pass->groups) score_groups(pass, group, 1);
}

// The largest score of each query.
static void find_largest(const Pass *pass) {
    for (int lane = 0; lane < TILE; lane += WIDTH) {
        const float *row = &pass->scores[0][0][lane];
        const vi seen = seen_by(pass, lane);
        vf largest[4];
        for (int i = 0; i < 4; i++) largest[i] = vf_splat(-INFINITY);
        int key = 0;
        for (; key < pass->whole_groups * GROUP; key += 4, row += 4 * TILE) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) largest[i] = vf_max(largest[i], vf_load(row + i * TILE));
        }
        for (; key < pass->groups * GROUP; key++, row += TILE) {
            const vi is_seen = (vi)(vi_splat(key) < seen);
            largest[0] = vf_max(largest[0], select_floats(is_seen, vf_load(row), vf_splat(-INFINITY)));
        }
        const vf one = vf_max(largest[0], largest[1]), other = vf_max(largest[2], largest[3]);
        vf_store(pass->sums->largest + lane, vf_max(one, other));
        vf_store(pass->sums->total + lane, vf_zero());
    }
}

// 2^x for x <= 0, to 13 bits at least: a weight keeps 8. NaN stays NaN.
#if WIDTH == 16
INLINE vf weight_of(vf x) { return vf_rough_exp2(vf_max(vf_splat(-125.0f), x)); }
#else
INLINE vf weight_of(vf x) { return vf_exp2(x); }
#endif

INLINE vi rounded_pair(vf first, vf second) {
    return pair_upper_halves((vi)first + vi_splat(0x8000), (vi)second + vi_splat(0x8000));
}

// Turn the scores of 32 keys into pairs of weights, zero for those that a query does not see.
INLINE void weigh_group(const int is_whole, const Pass *pass, int group) {
    for (int lane = 0; lane < TILE; lane += WIDTH) {
        const vf subtract = vf_load(pass->sums->largest + lane);
        const vi seen = seen_by(pass, lane);
        vf total = vf_load(pass->sums->total + lane);
        const float *row = &pass->scores[2 * group][0][lane];
        uint32_t *to = &pass->tiles->weights[group][0][lane];
#pragma GCC unroll 4
        for (int pair = 0; pair < TILE; pair++, row += 2 * TILE, to += TILE) {
            vf first = weight_of(vf_load(row) - subtract), second = weight_of(vf_load(row + TILE) - subtract);
            if (!is_whole) {
                const int key = group * GROUP + 2 * pair;
                first = select_floats((vi)(vi_splat(key) < seen), first, vf_zero());
                second = select_floats((vi)(vi_splat(key + 1) < seen), second, vf_zero());
            }
            total = total + (first + second);
            vi_store(to, rounded_pair(first, second));
        }
        vf_store(pass->sums->total + lane, total);
    }
}

// The weighted sums of two tiles of dims, of the last ones.
INLINE void sum_two_dim_tiles(const Pass *pass, int dim_tile) {
    Tiles *const tiles = pass->tiles;
    tile_zero(0);
    tile_zero(1);
    for (int group = 0; group < pass->groups; group++) {
        tile_load(4, tiles->weights[group], AMX_BYTES);
        tile_load(5, tiles->values[group][dim_tile], AMX_BYTES);
        tile_dot_bf16(0, 5, 4);
        tile_load(6, tiles->values[group][dim_tile + 1], AMX_BYTES);
        tile_dot_bf16(1, 6, 4);
    }
    tile_store(0, pass->sums->dims[dim_tile], AMX_BYTES);
    tile_store(1, pass->sums->dims[dim_tile + 1], AMX_BYTES);
}

// The weighted sums, four tiles of dims at a time: with fewer, each product would wait for the one before it.
static void sum_dims(const Pass *pass) {
    Tiles *const tiles = pass->tiles;
    int dim_tile = 0;
    for (; dim_tile + 4 <= 2 * pass->dim_groups; dim_tile += 4) {
        tile_zero(0);
        tile_zero(1);
        tile_zero(2);
        tile_zero(3);
        for (int group = 0; group < pass->groups; group++) {
            tile_load(4, tiles->weights[group], AMX_BYTES);
            tile_load(5, tiles->values[group][dim_tile], AMX_BYTES);
            tile_dot_bf16(0, 5, 4);
            tile_load(6, tiles->values[group][dim_tile + 1], AMX_BYTES);
            tile_dot_bf16(1, 6, 4);
            tile_load(7, tiles->values[group][dim_tile + 2], AMX_BYTES);
            tile_dot_bf16(2, 7, 4);
            tile_load(5, tiles->values[group][dim_tile + 3], AMX_BYTES);
            tile_dot_bf16(3, 5, 4);
        }
        tile_store(0, pass->sums->dims[dim_tile], AMX_BYTES);
        tile_store(1, pass->sums->dims[dim_tile + 1], AMX_BYTES);
        tile_store(2, pass->sums->dims[dim_tile + 2], AMX_BYTES);
        tile_store(3, pass->sums->dims[dim_tile + 3], AMX_BYTES);
    }
    if (dim_tile < 2 * pass->dim_groups) sum_two_dim_tiles(pass, dim_tile);
}

// Whether the values that only later queries of the tile see are all finite: a weight of 0 leaves out no others.
static int are_values_finite(const Pass *pass) {
    const vi upper = vi_splat(0x7f800000), lower = vi_splat(0x7f80);
    vi found = {0};
    for (int group = pass->whole_groups; group < pass->groups; group++) {
        for (int i = 0; i < pass->dim_groups * GROUP * TILE; i += WIDTH) {
            const vi pairs = vi_load((const uint32_t *)pass->tiles->values[group][0] + i);
            found |= (vi)((pairs & upper) == upper) | (vi)((pairs & lower) == lower);
        }
    }
    for (int lane = 0; lane < WIDTH; lane++) {
        if (found[lane]) return 0;
    }
    return 1;
}

// Forget the block's values from key `first` on, up to `end`.
static void clear_values(const Pass *pass, int first, int end) {
    for (int key = first; key < end; key++) {
        uint32_t *pairs = (uint32_t *)pass->tiles->values[key / GROUP][0] + key % GROUP / 2;
        for (int d = 0; d < pass->dim_groups * GROUP; d++) pairs[d * TILE] &= key % 2 ? 0xffffu : 0xffff0000u;
    }
}

// The sums query by query, the last one first: without the values that a query does not see. 0 * NaN is not 0.
static void sum_by_queries(const Pass *pass) {
    const int num_dims = pass->dim_groups * GROUP;
    float kept[MAX_PADDED_DIM * TILE], *sums = (float *)pass->sums->dims;
    for (int query = TILE - 1; query >= 0; query--) {
        const int64_t seen = pass->tiles->seen[pass->query_tile][query] - pass->first;
        clear_values(pass, seen < 0 ? 0 : (int)seen, pass->groups * GROUP);
        sum_dims(pass);
        for (int d = 0; d < num_dims; d++) kept[d * TILE + query] = sums[d * TILE + query];
    }
    memcpy(sums, kept, (size_t)num_dims * TILE * sizeof *kept);
}

// Ask for keys or values of a group.
INLINE void fetch(const Located *next, int key, int64_t offset, int64_t key_bytes) {
    for (int i = key; i < key + GROUP && i < next->num; i++) {
        for (int64_t byte = 0; byte < key_bytes; byte += 64) __builtin_prefetch(next->keys[i] + offset + byte, 0, 2);
    }
}

static void fetch_block(const Work *work, const Located *at) {
    const int64_t key_bytes = work->job->head_dim * kv_item_bytes(work->job->kv_dtype);
    for (int key = 0; key < at->num; key += GROUP) {
        fetch(at, key, 0, key_bytes);
        fetch(at, key, value_offset(work->job), key_bytes);
    }
}

// Finish `now`, whose scores are known, into its sums, and compute the scores of `next`.
static void run_pass(const Pass *now, const Pass *next) {
    if (now->groups) find_largest(now);
    for (int group = 0; group < next->groups || group < now->groups; group++) {
        if (group % 2 == 0) score_some(next, group);
        if (group < now->whole_groups) weigh_group(1, now, group);
        else if (group < now->groups) weigh_group(0, now, group);
    }
    if (now->groups == 0) return;
    if (now->whole_groups == now->groups || are_values_finite(now)) sum_dims(now);
    else sum_by_queries(now);
}

// Add the sums of keys from position `first` on to those of the keys before them, if there are some.
static void merge(const Pass *pass, const Sums *from, int64_t first, int is_first, Sums *to) {
    const int num_dims = pass->dim_groups * GROUP;
    const float *more = (const float *)from->dims;
    float *sums = (float *)to->dims;
    if (is_first) {
        memcpy(sums, more, (size_t)num_dims * TILE * sizeof *sums);
        memcpy(to->largest, from->largest, sizeof to->largest);
        memcpy(to->total, from->total, sizeof to->total);
        return;
    }
    for (int lane = 0; lane < TILE; lane += WIDTH) {
        const vi sees_some = (vi)(vi_load(pass->tiles->seen[pass->query_tile] + lane) > vi_splat((int32_t)first));
        const vf before = vf_load(to->largest + lane), largest = vf_load(from->largest + lane);
        const vf after = select_floats((vi)(largest > before), largest, before);
        const vf keep = vf_exp2(before - after), add = vf_exp2(largest - after), total = vf_load(to->total + lane);
        vf_store(to->largest + lane, after);
        vf_store(to->total + lane, select_floats(sees_some, total * keep + vf_load(from->total + lane) * add, total));
        for (int d = 0; d < num_dims; d++) {
            const vf sum = vf_load(sums + d * TILE + lane);
            const vf merged = vf_fma(vf_load(more + d * TILE + lane), add, sum * keep);
            vf_store(sums + d * TILE + lane, select_floats(sees_some, merged, sum));
        }
    }
}

// The block's result where the merge of split rows looks for it.
static void keep_block(const Work *work, int tile, const Sums *block) {
    const int row = tile * TILE, num = work->stacked - row < TILE ? work->stacked - row : TILE;
    for (int dim_tile = 0; dim_tile < 2 * num_dim_groups(work); dim_tile++) {
        Floats rows;
        transpose_tile(block->dims[dim_tile], rows);
        for (int i = 0; i < num; i++) {
            memcpy(scratch.block_sums + (row + i) * work->padded_dim + dim_tile * TILE, rows[i], sizeof rows[i]);
        }
    }
    memcpy(scratch.block_largest + row, block->largest, (size_t)num * sizeof(float));
    memcpy(scratch.block_total + row, block->total, (size_t)num * sizeof(float));
}

static void finish_tile(const Work *work, int tile) {
    const AttentionJob *job = work->job;
    const Sums *sums = &tile_scratch.all[tile];
    const int64_t dim = job->head_dim;
    float sinks[TILE] = {0};
    for (int i = 0; i < TILE && job->sinks; i++) {
        sinks[i] = job->sinks[work->head * work->per_kv + (tile * TILE + i) % work->per_kv] * LOG2_E;
    }
    for (int dim_tile = 0; dim_tile * TILE < dim; dim_tile++) {
        Floats scaled, rows;
        for (int lane = 0; lane < TILE; lane += WIDTH) {
            const vf total = vf_load(sums->total + lane);
            const vf scale = job->sinks ? end_scale(vf_load(sums->largest + lane), total, vf_load(sinks + lane))
                                        : vf_splat(1.0f) / total;
            for (int d = 0; d < TILE; d++) vf_store(scaled[d] + lane, vf_load(sums->dims[dim_tile][d] + lane) * scale);
        }
        transpose_tile(scaled, rows);
        const int64_t left = dim - dim_tile * TILE, num = left < TILE ? left : TILE;
        for (int row = tile * TILE; row < (tile + 1) * TILE && row < work->stacked; row++) {
            const int64_t token = work->first_token + row / work->per_kv;
            const int64_t head = work->head * work->per_kv + row % work->per_kv;
            float *out = job->out + (token * job->num_heads + head) * dim + dim_tile * TILE;
            memcpy(out, rows[row % TILE], (size_t)num * sizeof *out);
        }
    }
}

// Pass all tiles of queries through the keys, the last one first: it sees the most.
static void run_passes(const Pass *keys, const Located *next) {
    const Work *work = keys->work;
    const int64_t key_bytes = work->job->head_dim * kv_item_bytes(work->job->kv_dtype);
    for (int key = 0; key < keys->num && !are_keys_in_place(work->job); key++) {
        copy_key(work, keys->at, keys->begin + key, key, keys->tiles);
    }
    Pass now = pass_of(keys, num_query_tiles(work) - 1);
    for (int group = 0; group * GROUP < keys->num; group++) {
        if (group % 2 == 0) score_some(&now, group);
        pack_value_tiles(work, keys->at, keys->begin, group, keys->tiles);
        fetch(next, keys->begin + group * GROUP, 0, key_bytes);
        fetch(next, keys->begin + group * GROUP, value_offset(work->job), key_bytes);
    }
    for (int tile = now.query_tile - 1; tile >= -1; tile--) {
        const Pass after = pass_of(keys, tile);
        run_pass(&now, &after);
        if (now.groups && now.begin) merge(&now, now.sums, now.first, 0, &now.tiles->block[now.query_tile]);
        now = after;
    }
}

static void attend_block_in_tiles(const Work *work, const Located *at, const Located *next, int64_t first) {
    Tiles *const tiles = &tile_scratch;
    Pass keys = {.work = work, .at = at, .dim_groups = num_dim_groups(work), .tiles = tiles};
    for (int begin = 0; begin < at->num; begin += PASS_KEYS) {
        keys.begin = begin, keys.num = within(at->num - begin, PASS_KEYS), keys.first = first + begin;
        run_passes(&keys, next);
    }
    for (int tile = 0; tile < num_query_tiles(work); tile++) {
        if (tiles->seen[tile][TILE - 1] <= first) continue;
        const Pass pass = pass_of(&keys, tile);
        if (work->block < 0) merge(&pass, &tiles->block[tile], first, first == 0, &tiles->all[tile]);
        else keep_block(work, tile, &tiles->block[tile]);
    }
}

#endif
