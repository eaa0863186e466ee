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
    const int32_t *seen = pass.tiles->seen[query_tile];
    pass.whole_groups = within(seen[0] - pass.first, pass.num) / GROUP;
    pass.groups = (within(seen[TILE - 1] - pass.first, pass.num) + GROUP - 1) / GROUP;
    return pass;
}

// How many keys from the pass's first on each query of some lanes sees; below 1: none.
INLINE vi seen_by(const Pass *pass, int lane) {
    return vi_load(pass->tiles->seen[pass->query_tile] + lane) - vi_splat((int32_t)pass->first);
}

INLINE void score_group(const Pass *pass, int group) {
    const AttentionJob *job = pass->work->job;
    const int in_place = are_keys_in_place(job), part_bytes = in_place ? AMX_BYTES : (int)sizeof(Pairs);
    const int64_t stride = in_place ? job->head_dim * 2 : AMX_BYTES;
    const int key = 2 * group * TILE, second = key + TILE < pass->num ? key + TILE : key;
    const uint8_t *const *keys = pass->at->keys + pass->begin;
    const uint8_t *from = in_place ? keys[key] : (const uint8_t *)pass->tiles->keys[key / TILE];
    const uint8_t *more = in_place ? keys[second] : (const uint8_t *)pass->tiles->keys[second / TILE];
    tile_zero(6);
    tile_zero(7);
    for (int part = 0; part < pass->dim_groups; part += 2) {  // a load waits for the products that read its tile
        tile_load(4, pass->tiles->queries[pass->query_tile][part], AMX_BYTES);
        tile_load(0, from + part * part_bytes, stride);
        tile_load(1, more + part * part_bytes, stride);
        tile_dot_bf16(6, 0, 4);
        tile_dot_bf16(7, 1, 4);
        if (part + 1 == pass->dim_groups) break;
        tile_load(5, pass->tiles->queries[pass->query_tile][part + 1], AMX_BYTES);
        tile_load(2, from + (part + 1) * part_bytes, stride);
        tile_load(3, more + (part + 1) * part_bytes, stride);
        tile_dot_bf16(6, 2, 5);
        tile_dot_bf16(7, 3, 5);
    }
    tile_store(6, pass->scores[2 * group], AMX_BYTES);
    tile_store(7, pass->scores[2 * group + 1], AMX_BYTES);
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
        vf_store(pass->tiles->pass.largest + lane, vf_max(one, other));
        vf_store(pass->tiles->pass.total + lane, vf_zero());
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
        const vf subtract = vf_load(pass->tiles->pass.largest + lane);
        const vi seen = seen_by(pass, lane);
        vf total = vf_load(pass->tiles->pass.total + lane);
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
        vf_store(pass->tiles->pass.total + lane, total);
    }
}

// The weighted sums of two tiles of dims after another. Groups take turns in the tiles that they load.
static void sum_dims(const Pass *pass) {
    const Tiles *tiles = pass->tiles;
    for (int dim_tile = 0; dim_tile < 2 * pass->dim_groups; dim_tile += 2) {
        tile_zero(0);
        tile_zero(1);
        for (int group = 0; group < pass->groups; group += 2) {
            tile_load(2, tiles->weights[group], AMX_BYTES);
            tile_load(4, tiles->values[group][dim_tile], AMX_BYTES);
            tile_load(5, tiles->values[group][dim_tile + 1], AMX_BYTES);
            tile_dot_bf16(0, 4, 2);
            tile_dot_bf16(1, 5, 2);
            if (group + 1 == pass->groups) break;
            tile_load(3, tiles->weights[group + 1], AMX_BYTES);
            tile_load(6, tiles->values[group + 1][dim_tile], AMX_BYTES);
            tile_load(7, tiles->values[group + 1][dim_tile + 1], AMX_BYTES);
            tile_dot_bf16(0, 6, 3);
            tile_dot_bf16(1, 7, 3);
        }
        tile_store(0, tiles->pass.dims[dim_tile], AMX_BYTES);
        tile_store(1, tiles->pass.dims[dim_tile + 1], AMX_BYTES);
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
    float kept[MAX_PADDED_DIM * TILE], *sums = (float *)pass->tiles->pass.dims;
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

// Finish `now`, whose scores are known, into tiles->pass, and compute the scores of `next`.
static void run_pass(const Pass *now, const Pass *next) {
    if (now->groups) find_largest(now);
    for (int group = 0; group < next->groups || group < now->groups; group++) {
        if (group < next->groups) score_group(next, group);
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
        if (group < now.groups) score_group(&now, group);
        pack_value_tiles(work, keys->at, keys->begin, group, keys->tiles);
        fetch(next, keys->begin + group * GROUP, 0, key_bytes);
        fetch(next, keys->begin + group * GROUP, value_offset(work->job), key_bytes);
    }
    for (int tile = now.query_tile - 1; tile >= -1; tile--) {
        const Pass after = pass_of(keys, tile);
        run_pass(&now, &after);
        if (now.groups) merge(&now, &now.tiles->pass, now.first, now.begin == 0, &now.tiles->block[now.query_tile]);
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
