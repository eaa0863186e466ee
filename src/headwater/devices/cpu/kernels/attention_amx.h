// Attention of prompts in tiles of AMX. Queries, keys, values and weights are bfloat16, scores and sums float32.
//
// Tiles of 16 queries pass one after another through a block of keys. While one turns its scores into weights and adds
// up values, the scores of the next one are computed: products of tiles and vectors run side by side.

#pragma once

#include "allowed.h"
#include "attention_tiles.h"

#if HAS_AMX

enum { TILES_AT_ONCE = 4 };  // of dims, whose sums stay in tiles 0 to 3
enum { WEIGHTS_LAG = 2 };    // groups between the stores of weights and their load as a tile, which would wait

// A tile of queries and the block of keys that it passes through.
typedef struct {
    const Work *work;
    const Located *at;
    int64_t first;       // key of the block
    int query_tile;      // -1: none
    int groups;          // of keys that some query sees
    int whole_groups;    // that all queries see
    int dim_groups;
    Floats *scores;
    Tiles *tiles;        // this thread's
} Pass;

static Pass open_pass(const Work *work, const Located *at, int64_t first, int query_tile, Tiles *tiles) {
    Pass pass = {work, at, first, query_tile, 0, 0, num_dim_groups(work), tiles->scores[query_tile & 1], tiles};
    if (query_tile < 0) return pass;
    const int64_t least = tiles->seen[query_tile][0] - first, most = tiles->seen[query_tile][TILE - 1] - first;
    pass.whole_groups = (int)(least < 0 ? 0 : least < at->num ? least : at->num) / GROUP;
    pass.groups = (int)((most < 0 ? 0 : most < at->num ? most : at->num) + GROUP - 1) / GROUP;
    return pass;
}

// How many keys from the block's first on each query of some lanes sees; below 1: none.
INLINE vi seen_by(const Pass *pass, int lane) {
    return vi_load(pass->tiles->seen[pass->query_tile] + lane) - vi_splat((int32_t)pass->first);
}

INLINE void score_group(const Pass *pass, int group) {
    const AttentionJob *job = pass->work->job;
    const int in_place = are_keys_in_place(job), part_bytes = in_place ? AMX_BYTES : (int)sizeof(Pairs);
    const int64_t stride = in_place ? job->head_dim * 2 : AMX_BYTES;
    const int last = (pass->at->num - 1) / TILE, second = 2 * group + 1 < last ? 2 * group + 1 : last;
    const uint8_t *from = in_place ? pass->at->keys[2 * group * TILE] : (const uint8_t *)pass->tiles->keys[2 * group];
    const uint8_t *more = in_place ? pass->at->keys[second * TILE] : (const uint8_t *)pass->tiles->keys[second];
    tile_zero(6);
    tile_zero(7);
    for (int part = 0; part < pass->dim_groups; part++) {
        tile_load(4, pass->tiles->queries[pass->query_tile][part], AMX_BYTES);
        tile_load(5, from + part * part_bytes, stride);
        tile_dot_bf16(6, 5, 4);
        tile_load(5, more + part * part_bytes, stride);
        tile_dot_bf16(7, 5, 4);
    }
    tile_store(6, pass->scores[2 * group], AMX_BYTES);
    tile_store(7, pass->scores[2 * group + 1], AMX_BYTES);
}

// The largest score of each query in the block.
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
        vf_store(pass->tiles->block_largest + lane, vf_max(one, other));
        vf_store(pass->tiles->block_total + lane, vf_zero());
    }
}

// 2^x for x <= 0 to 13 bits: a weight keeps 8. NaN stays NaN.
#if WIDTH == 16
INLINE vf weight_of(vf x) {
    x = vf_max(vf_splat(-125.0f), x);
    const vf r = vf_above_floor(x);
    vf p = vf_splat(7.802451e-2f);
    p = vf_fma(p, r, vf_splat(2.2606717e-1f));
    p = vf_fma(p, r, vf_splat(6.9583354e-1f));
    p = vf_fma(p, r, vf_splat(9.9992522e-1f));
    return vf_times_2_to_floor(p, x);
}
#else
INLINE vf weight_of(vf x) { return vf_exp2(x); }
#endif

INLINE vi rounded_pair(vf first, vf second) {
    return pair_upper_halves((vi)first + vi_splat(0x8000), (vi)second + vi_splat(0x8000));
}

// Turn the scores of 32 keys into pairs of weights, zero for those that a query does not see.
INLINE void weigh_group(const int is_whole, const Pass *pass, int group) {
    for (int lane = 0; lane < TILE; lane += WIDTH) {
        const vf subtract = vf_load(pass->tiles->block_largest + lane);
        const vi seen = seen_by(pass, lane);
        vf total = vf_load(pass->tiles->block_total + lane);
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
        vf_store(pass->tiles->block_total + lane, total);
    }
}

// Add the weighted values of 32 keys to two or four tiles of dims.
INLINE void add_values(const Pass *pass, int group, int dim_tile) {
    tile_load(4, pass->tiles->weights[group], AMX_BYTES);
    tile_load(5, pass->tiles->values[group][dim_tile], AMX_BYTES);
    tile_dot_bf16(0, 5, 4);
    tile_load(5, pass->tiles->values[group][dim_tile + 1], AMX_BYTES);
    tile_dot_bf16(1, 5, 4);
    if (dim_tile + 2 >= 2 * pass->dim_groups) return;
    tile_load(5, pass->tiles->values[group][dim_tile + 2], AMX_BYTES);
    tile_dot_bf16(2, 5, 4);
    tile_load(5, pass->tiles->values[group][dim_tile + 3], AMX_BYTES);
    tile_dot_bf16(3, 5, 4);
}

INLINE void clear_sums(void) {
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
}

INLINE void store_sums(const Pass *pass, int dim_tile) {
    tile_store(0, pass->tiles->block_sums[dim_tile], AMX_BYTES);
    tile_store(1, pass->tiles->block_sums[dim_tile + 1], AMX_BYTES);
    if (dim_tile + 2 >= 2 * pass->dim_groups) return;
    tile_store(2, pass->tiles->block_sums[dim_tile + 2], AMX_BYTES);
    tile_store(3, pass->tiles->block_sums[dim_tile + 3], AMX_BYTES);
}

// The sums of all tiles of dims from `dim_tile` on.
static void sum_dims(const Pass *pass, int dim_tile) {
    for (; dim_tile < 2 * pass->dim_groups; dim_tile += TILES_AT_ONCE) {
        clear_sums();
        for (int group = 0; group < pass->groups; group++) add_values(pass, group, dim_tile);
        store_sums(pass, dim_tile);
    }
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
    float kept[MAX_PADDED_DIM * TILE], *sums = (float *)pass->tiles->block_sums;
    for (int query = TILE - 1; query >= 0; query--) {
        const int64_t seen = pass->tiles->seen[pass->query_tile][query] - pass->first;
        clear_values(pass, seen < 0 ? 0 : (int)seen, pass->groups * GROUP);
        sum_dims(pass, 0);
        for (int d = 0; d < num_dims; d++) kept[d * TILE + query] = sums[d * TILE + query];
    }
    memcpy(sums, kept, (size_t)num_dims * TILE * sizeof *kept);
}

// Ask for keys or values of the block that comes next.
INLINE void fetch(const Located *next, int key, int64_t offset, int64_t key_bytes) {
    for (int i = key; i < key + GROUP && i < next->num; i++) {
        for (int64_t byte = 0; byte < key_bytes; byte += 64) __builtin_prefetch(next->keys[i] + offset + byte, 0, 2);
    }
}

// Finish `now`, whose scores are known, into tiles->block_*, and compute the scores of `next`.
static void run_pass(const Pass *now, const Pass *next) {
    const int is_finite = now->whole_groups == now->groups || are_values_finite(now);
    if (now->groups) find_largest(now);
    clear_sums();
    for (int group = 0; group < next->groups || group < now->groups + WEIGHTS_LAG; group++) {
        if (group < next->groups) score_group(next, group);
        if (group < now->whole_groups) weigh_group(1, now, group);
        else if (group < now->groups) weigh_group(0, now, group);
        const int weighted = group - WEIGHTS_LAG;
        if (is_finite && weighted >= 0 && weighted < now->groups) add_values(now, weighted, 0);
    }
    if (!now->groups) return;
    if (!is_finite) {
        sum_by_queries(now);
        return;
    }
    store_sums(now, 0);
    sum_dims(now, TILES_AT_ONCE);
}

// Add the block's result to what the queries of a tile have so far.
static void merge_tile(const Pass *pass) {
    const int num_dims = pass->dim_groups * GROUP, tile = pass->query_tile;
    float *sums = (float *)pass->tiles->sums[tile];
    const float *block = (const float *)pass->tiles->block_sums;
    if (pass->first == 0) {
        memcpy(sums, block, (size_t)num_dims * TILE * sizeof *sums);
        memcpy(pass->tiles->largest[tile], pass->tiles->block_largest, sizeof pass->tiles->block_largest);
        memcpy(pass->tiles->total[tile], pass->tiles->block_total, sizeof pass->tiles->block_total);
        return;
    }
    for (int lane = 0; lane < TILE; lane += WIDTH) {
        float *total = pass->tiles->total[tile] + lane;
        const vi sees_some = (vi)(seen_by(pass, lane) > vi_splat(0));
        const vf before = vf_load(pass->tiles->largest[tile] + lane);
        const vf largest = vf_load(pass->tiles->block_largest + lane);
        const vf after = select_floats((vi)(largest > before), largest, before);
        const vf keep = vf_exp2(before - after), add = vf_exp2(largest - after);
        vf_store(pass->tiles->largest[tile] + lane, after);
        const vf both = vf_load(total) * keep + vf_load(pass->tiles->block_total + lane) * add;
        vf_store(total, select_floats(sees_some, both, vf_load(total)));
        for (int d = 0; d < num_dims; d++) {
            float *sum = sums + d * TILE + lane;
            const vf merged = vf_fma(vf_load(block + d * TILE + lane), add, vf_load(sum) * keep);
            vf_store(sum, select_floats(sees_some, merged, vf_load(sum)));
        }
    }
}

// The block's result where the merge of split rows looks for it.
static void keep_block(const Pass *pass) {
    const Work *work = pass->work;
    const int row = pass->query_tile * TILE, num = work->stacked - row < TILE ? work->stacked - row : TILE;
    for (int dim_tile = 0; dim_tile < 2 * num_dim_groups(work); dim_tile++) {
        Floats rows;
        transpose_tile(pass->tiles->block_sums[dim_tile], rows);
        for (int i = 0; i < num; i++) {
            memcpy(scratch.block_sums + (row + i) * work->padded_dim + dim_tile * TILE, rows[i], sizeof rows[i]);
        }
    }
    memcpy(scratch.block_largest + row, pass->tiles->block_largest, (size_t)num * sizeof(float));
    memcpy(scratch.block_total + row, pass->tiles->block_total, (size_t)num * sizeof(float));
}

static void finish_tile(const Work *work, int tile) {
    const Tiles *tiles = &tile_scratch;
    const AttentionJob *job = work->job;
    const int64_t dim = job->head_dim;
    for (int dim_tile = 0; dim_tile * TILE < dim; dim_tile++) {
        Floats scaled, rows;
        for (int lane = 0; lane < TILE; lane += WIDTH) {
            const vf scale = vf_splat(1.0f) / vf_load(tiles->total[tile] + lane);
            for (int d = 0; d < TILE; d++) {
                vf_store(scaled[d] + lane, vf_load(tiles->sums[tile][dim_tile][d] + lane) * scale);
            }
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

// Pass all tiles of queries through a block, the last one first: it sees the most keys.
static void attend_block_in_tiles(const Work *work, const Located *at, const Located *next, int64_t first) {
    const int64_t key_bytes = work->job->head_dim * kv_item_bytes(work->job->kv_dtype);
    Tiles *const tiles = &tile_scratch;
    for (int key = 0; key < at->num && !are_keys_in_place(work->job); key++) copy_key(work, at, key, tiles);
    Pass now = open_pass(work, at, first, num_query_tiles(work) - 1, tiles);
    for (int group = 0; group * GROUP < at->num; group++) {
        if (group < now.groups) score_group(&now, group);
        pack_value_tiles(work, at, group, tiles);
        fetch(next, group * GROUP, 0, key_bytes);
        fetch(next, group * GROUP, value_offset(work->job), key_bytes);
    }
    for (int tile = now.query_tile - 1; tile >= -1; tile--) {
        const Pass after = open_pass(work, at, first, tile, tiles);
        run_pass(&now, &after);
        if (now.groups && work->block < 0) merge_tile(&now);
        else if (now.groups) keep_block(&now);
        now = after;
    }
}

#endif
