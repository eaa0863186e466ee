// Paged causal attention with an online softmax (FlashAttention, arXiv 2205.14135), prefill chunks and decodes alike.
//
// A chunk of work is some queries of one row and one KV head. The query heads that share a KV head are stacked, so that
// a block of keys is read and packed once for all of them. Blocks begin at multiples of BLOCK_KEYS. Each gives its
// result from scratch, and results are merged in order: so bits depend neither on the cut into chunks nor on whether the
// blocks of a row are computed one after another or by several threads.

#include <stdatomic.h>

#include "attention_amx.h"
#include "attention_direct.h"

// Keys [first, first + num) of a block for scores = queries x keys^T. Lanes of missing keys repeat the last key.
INLINE void pack_keys_of(const int dtype, const Work *work, const Located *at, int first, int num, const Ahead *ahead) {
    const int64_t dim = work->job->head_dim;
    for (int key = 0; key < num; key += WIDTH) {
        const uint8_t *from[WIDTH];
        vf scales[WIDTH], x[WIDTH];
        for (int i = 0; i < WIDTH; i++) {
            const int at_key = first + (key + i < num ? key + i : num - 1);
            from[i] = at->keys[at_key];
            scales[i] = kv_is_scaled(dtype) ? scale_of(*at->exponents[at_key]) : vf_zero();
        }
        prefetch(ahead, key, WIDTH, dim * kv_item_bytes(dtype));
        float *packed = scratch.keys + key / PANEL * keys_stride(dim) + key % PANEL;
        int64_t d = 0;
        for (; dtype == KV_BF16 && d + 2 * WIDTH <= dim; d += 2 * WIDTH) {  // widened after the transposition: half of it
            for (int i = 0; i < WIDTH; i++) x[i] = (vf)vi_load(from[i] + d * 2);
            vf_transpose(x);
            for (int i = 0; i < WIDTH; i++) {
                vf_store(packed + (d + 2 * i) * PANEL, (vf)((vi)x[i] << 16));
                vf_store(packed + (d + 2 * i + 1) * PANEL, (vf)((vi)x[i] & vi_splat((int32_t)0xffff0000)));
            }
        }
        for (; d + WIDTH <= dim; d += WIDTH) {
            for (int i = 0; i < WIDTH; i++) x[i] = load_kv(dtype, from[i], d, scales[i]);
            vf_transpose(x);
            for (int i = 0; i < WIDTH; i++) vf_store(packed + (d + i) * PANEL, x[i]);
        }
        if (d == dim) continue;
        for (int i = 0; i < WIDTH; i++) x[i] = load_kv_n(dtype, from[i], d, dim - d, scales[i]);
        vf_transpose(x);
        for (int i = 0; d + i < dim; i++) vf_store(packed + (d + i) * PANEL, x[i]);
    }
}

// Values [first, first + num) of a block for sums += weights x values.
INLINE void pack_values_of(const int dtype, const Work *work, const Located *at, int first, int num, const Ahead *ahead) {
    const int64_t dim = work->job->head_dim, offset = value_offset(work->job);
    const int64_t exponent_offset = work->job->num_kv_heads * work->job->page_size;
    for (int key = 0; key < num; key++) {
        const uint8_t *from = at->keys[first + key] + offset;
        const vf scale = kv_is_scaled(dtype) ? scale_of(at->exponents[first + key][exponent_offset]) : vf_zero();
        prefetch(ahead, key, 1, dim * kv_item_bytes(dtype));
        float *packed = scratch.values + key * PANEL;
        int64_t d = 0;
        for (; d + PANEL <= dim; d += PANEL, packed += VALUES_STRIDE) {
            vf_store(packed, load_kv(dtype, from, d, scale));
            vf_store(packed + WIDTH, load_kv(dtype, from, d + WIDTH, scale));
        }
        for (; d < dim; d += WIDTH) {
            const int64_t n = dim - d < WIDTH ? dim - d : WIDTH;
            vf_store(packed + d % PANEL, n < WIDTH ? load_kv_n(dtype, from, d, n, scale) : load_kv(dtype, from, d, scale));
        }
    }
}

static void pack_keys(const Work *work, const Located *at, int first, int num, const Ahead *ahead) {
    FOR_DTYPE(pack_keys_of, work, at, first, num, ahead)
}

static void pack_values(const Work *work, const Located *at, int first, int num, const Ahead *ahead) {
    FOR_DTYPE(pack_values_of, work, at, first, num, ahead)
}

// Turn one stacked query's scores into weights; keys [hidden, end) of the block are visible to it.
static void softmax_row(int row, int64_t hidden, int64_t end) {
    float *scores = scratch.scores + row * SCORES_STRIDE + hidden;
    const int64_t num = end - hidden;
    const int64_t whole = num / WIDTH * WIDTH, rest = num - whole;
    const float most = largest_score(scores, num);
    const vf subtract = vf_splat(most);
    vf total = vf_zero();
    for (int64_t i = 0; i < whole; i += WIDTH) {
        const vf weight = vf_exp2(vf_load(scores + i) - subtract);
        vf_store(scores + i, weight);
        total = total + weight;
    }
    if (rest) {
        float last[WIDTH] = {0};
        vf_store(last, vf_exp2(vf_load_n(scores + whole, rest) - subtract));
        const vf weight = vf_load_n(last, rest);
        vf_store(scores + whole, weight);
        total = total + weight;
    }
    scratch.block_largest[row] = most;
    scratch.block_total[row] = vf_sum(total);
}

// Scores of a part of a block against all stacked queries that see some of it.
static void score_part(const Work *work, int64_t first, int part, int num) {
    const int tile_rows = tile_rows_for(work->stacked);
    const int64_t dim = work->job->head_dim;
    for (int row = 0; row < work->stacked; row += tile_rows) {
        const int rows = work->stacked - row < tile_rows ? work->stacked - row : tile_rows;
        const int64_t cols = visible_in_part(work, row + rows - 1, first, part, num);
        const int at_row = work->first_stacked + row;
        multiply_tile(rows, (cols + PANEL - 1) / PANEL, scratch.queries + at_row * dim, dim, scratch.keys, keys_stride(dim),
                      dim, scratch.scores + at_row * SCORES_STRIDE + part, SCORES_STRIDE, 1);
    }
}

// Sums of `keys` weighted values of a part, from its key `skip` on, for some rows.
static void sum_rows(const Work *work, int row, int rows, int part, int64_t skip, int64_t keys) {
    row += work->first_stacked;
    multiply_tile(rows, work->padded_dim / PANEL, scratch.scores + row * SCORES_STRIDE + part + skip, SCORES_STRIDE,
                  scratch.values + skip * PANEL, VALUES_STRIDE, keys, scratch.block_sums + row * work->padded_dim,
                  work->padded_dim, part + skip == 0 && !work->job->window);
}

// With windows, sums begin with zeros: which key is the first one differs from row to row.
static void clear_sums(const Work *work) {
    if (!work->job->window) return;
    memset(scratch.block_sums + work->first_stacked * work->padded_dim, 0,
           (size_t)(work->stacked * work->padded_dim) * sizeof(float));
}

// The sums of a tile of rows of which each has a window. What all see is computed together, the keys before and behind
// it row by row, in the order of the keys.
static void sum_windows(const Work *work, int64_t first, int part, int num, int row, int rows) {
    int64_t begin = 0, end = num;
    for (int i = row; i < row + rows; i++) {
        const int64_t hidden = hidden_in_part(work, i, first, part, num), visible = visible_in_part(work, i, first, part, num);
        begin = hidden > begin ? hidden : begin;
        end = visible < end ? visible : end;
    }
    const int64_t common = begin < end ? end - begin : 0;
    for (int i = row; i < row + rows; i++) {
        const int64_t hidden = hidden_in_part(work, i, first, part, num);
        const int64_t until = common ? begin : visible_in_part(work, i, first, part, num);
        if (hidden < until) sum_rows(work, i, 1, part, hidden, until - hidden);
    }
    if (!common) return;
    sum_rows(work, row, rows, part, begin, common);
    for (int i = row; i < row + rows; i++) {
        const int64_t visible = visible_in_part(work, i, first, part, num);
        if (visible > end) sum_rows(work, i, 1, part, end, visible - end);
    }
}

static void sum_part(const Work *work, int64_t first, int part, int num) {
    const int tile_rows = tile_rows_for(work->stacked);
    for (int row = 0; row < work->stacked; row += tile_rows) {
        const int rows = work->stacked - row < tile_rows ? work->stacked - row : tile_rows;
        if (work->job->window) {
            sum_windows(work, first, part, num, row, rows);
            continue;
        }
        const int64_t common = visible_in_part(work, row, first, part, num);
        if (common) sum_rows(work, row, rows, part, 0, common);
        // What only later queries see, NaN perhaps, is left out for the earlier ones: not added with a weight of 0.
        for (int later = row + 1; later < row + rows; later++) {
            const int64_t more = visible_in_part(work, later, first, part, num) - common;
            if (more) sum_rows(work, later, 1, part, common, more);
        }
    }
}

// Scores of a block's keys from `begin` on.
static void score_block(const Work *work, const Located *at, const Located *next, int64_t first, int begin) {
    const int size = work->part_keys, without_packing = is_direct(work, first, at->num);
    const int64_t hidden = hidden_from_all(work, first);
    for (int part = begin; part < at->num; part += size) {
        const int num = at->num - part < size ? at->num - part : size;
        if (part + num <= hidden) continue;
        const Ahead ahead = ahead_of(work, at, next, part, 0);
        if (without_packing) {
            score_directly(work, at, part, num, &ahead);
            continue;
        }
        pack_keys(work, at, part, num, &ahead);
        score_part(work, first, part, num);
    }
}

static void softmax_block(const Work *work, const Located *at, int64_t first) {
    for (int row = 0; row < work->stacked; row++) {
        if (!sees_some(work, row, first)) continue;
        const int64_t visible = visible_keys(work, row, first);
        softmax_row(work->first_stacked + row, hidden_keys(work, row, first), visible < at->num ? visible : at->num);
    }
}

static void sum_block(const Work *work, const Located *at, const Located *next, int64_t first, int begin) {
    const int size = work->part_keys, without_packing = is_direct(work, first, at->num);
    const int64_t hidden = hidden_from_all(work, first);
    for (int part = begin; part < at->num; part += size) {
        const int num = at->num - part < size ? at->num - part : size;
        if (part + num <= hidden) continue;
        const Ahead ahead = ahead_of(work, at, next, part, 1);
        if (without_packing) {
            sum_directly(work, at, part, num, &ahead);
            continue;
        }
        pack_values(work, at, part, num, &ahead);
        sum_part(work, first, part, num);
    }
}

// The result of the block that begins at key `first`, into scratch.block_*. The block after it is `next`.
static void attend_block(const Work *work, const Located *at, const Located *next, int64_t first) {
#if HAS_AMX
    if (work->in_tiles) {
        attend_block_in_tiles(work, at, next, first);
        return;
    }
#endif
    score_block(work, at, next, first, 0);
    softmax_block(work, at, first);
    clear_sums(work);
    sum_block(work, at, next, first, 0);
}

// Fetch the first parts of a work, which nothing before has fetched.
static void prefetch_first(const Work *work, const Located *at) {
#if HAS_AMX
    if (work->in_tiles) {
        fetch_block(work, at);
        return;
    }
#endif
    const Ahead ahead = {at, 0, 0};
    prefetch(&ahead, 0, 2 * work->part_keys, work->job->head_dim * kv_item_bytes(work->job->kv_dtype));
}

// Add a block's result to what a stacked query has so far.
static void merge_row(const Work *work, int row, int64_t first, const float *block_sums, float largest, float total) {
    const int64_t dim = work->job->head_dim;
    float *sums = scratch.sums + row * dim;
    if (!sees_some(work, row, first)) return;
    if (first <= lowest_key(work, row)) {
        memcpy(sums, block_sums, (size_t)dim * sizeof *sums);
        scratch.largest[row] = largest;
        scratch.total[row] = total;
        return;
    }
    const float before = scratch.largest[row], after = largest > before ? largest : before;
    const vf keep = vf_exp2(vf_splat(before - after)), add = vf_exp2(vf_splat(largest - after));
    scratch.largest[row] = after;
    scratch.total[row] = scratch.total[row] * keep[0] + total * add[0];
    for (int64_t d = 0; d < dim; d += WIDTH) {
        const int64_t n = dim - d < WIDTH ? dim - d : WIDTH;
        vf_store_n(sums + d, vf_fma(vf_load_n(block_sums + d, n), add, vf_load_n(sums + d, n) * keep), n);
    }
}

static void finish_row(const Work *work, int row) {
    const AttentionJob *job = work->job;
    const int64_t dim = job->head_dim, token = work->first_token + row / work->per_kv;
    const int64_t head = work->head * work->per_kv + row % work->per_kv;
    const vf total = vf_splat(scratch.total[row]);
    const vf scale = job->sinks ? end_scale(vf_splat(scratch.largest[row]), total, vf_splat(job->sinks[head] * LOG2_E))
                                : vf_splat(1.0f) / total;
    float *out = job->out + (token * job->num_heads + head) * dim;
    for (int64_t d = 0; d < dim; d += WIDTH) {
        const int64_t n = dim - d < WIDTH ? dim - d : WIDTH;
        vf_store_n(out + d, vf_load_n(scratch.sums + row * dim + d, n) * scale, n);
    }
}

static void stack_queries(const Work *work) {
    const AttentionJob *job = work->job;
    const int64_t dim = job->head_dim;
    const vf scale = vf_splat(job->scale * LOG2_E);
    for (int row = 0; row < work->stacked; row++) {
        const int64_t query = row / work->per_kv;
        const float *heads = job->qkv + token_of(work, query) * qkv_stride(job);
        const float *head = heads + (work->head * work->per_kv + row % work->per_kv) * dim;
        for (int64_t d = 0; d < dim; d += WIDTH) {
            const int64_t n = dim - d < WIDTH ? dim - d : WIDTH;
            vf_store_n(scratch.queries + row * dim + d, vf_load_n(head + d, n) * scale, n);
        }
    }
}

static void attend_all(const Work *work) {
    static _Thread_local Located blocks[2];
    Located *now = &blocks[0], *next = &blocks[1];
    const int64_t lowest = lowest_key(work, 0) / BLOCK_KEYS * BLOCK_KEYS;
    locate(work, lowest, 0, now);
    prefetch_first(work, now);
    for (int64_t first = lowest; first < work->num_keys; first += BLOCK_KEYS) {
        locate(work, first + BLOCK_KEYS, 0, next);
        attend_block(work, now, next, first);
        for (int row = 0; row < work->stacked && !work->in_tiles; row++) {
            merge_row(work, row, first, scratch.block_sums + row * work->padded_dim, scratch.block_largest[row],
                      scratch.block_total[row]);
        }
        Located *const done = now;
        now = next;
        next = done;
    }
#if HAS_AMX
    if (work->in_tiles) {
        for (int tile = 0; tile < num_query_tiles(work); tile++) finish_tile(work, tile);
        return;
    }
#endif
    for (int row = 0; row < work->stacked; row++) finish_row(work, row);
}

// Where a split row keeps the result of a stacked query and a block: an index of [slots][num_heads].
INLINE int64_t partial_of(const Work *work, int row, int64_t block) {
    const int64_t slot = work->first_slot + row / work->per_kv * work->blocks_of_row + block;
    return slot * work->job->num_heads + work->head * work->per_kv + row % work->per_kv;
}

// Keep the block's results of a row's queries. If these were the last ones that the row waited for, merge them all.
static void end_block(const Work *work) {
    const AttentionJob *job = work->job;
    const int64_t dim = job->head_dim, first = work->block * BLOCK_KEYS;
    for (int row = 0; row < work->stacked; row++) {
        if (!sees_some(work, row, first)) continue;
        const int64_t partial = partial_of(work, row, work->block);
        const float *sums = scratch.block_sums + (work->first_stacked + row) * work->padded_dim;
        memcpy(job->partial_sums + partial * dim, sums, (size_t)dim * sizeof *sums);
        job->partial_stats[2 * partial] = scratch.block_largest[work->first_stacked + row];
        job->partial_stats[2 * partial + 1] = scratch.block_total[work->first_stacked + row];
    }
    _Atomic int32_t *num_done = (_Atomic int32_t *)job->num_done + work->first_slot * job->num_kv_heads + work->head;
    const int64_t num_blocks = (work->num_keys + BLOCK_KEYS - 1) / BLOCK_KEYS;
    if (atomic_fetch_add(num_done, 1) + 1 < num_blocks) return;
    atomic_store(num_done, 0);
    for (int row = 0; row < work->stacked; row++) {
        for (int64_t block = 0; block < num_blocks; block++) {
            const int64_t partial = partial_of(work, row, block);
            merge_row(work, row, block * BLOCK_KEYS, job->partial_sums + partial * dim, job->partial_stats[2 * partial],
                      job->partial_stats[2 * partial + 1]);
        }
        finish_row(work, row);
    }
}

static const Located NOTHING = {.num = 0};

// What rows see behind the common keys of a block: each row its own, whose scores and sums follow those of the common
// keys. The next row's keys are fetched meanwhile.
static void attend_own_keys(const Work *work, int64_t first, int is_values) {
    static _Thread_local Located own[2];
    const int64_t offset = is_values ? value_offset(work->job) : 0;
    const int64_t key_bytes = work->job->head_dim * kv_item_bytes(work->job->kv_dtype);
    for (int i = -1; i < work->num_rows; i++) {
        if (i + 1 < work->num_rows) {
            const Work next = open_row_of(work, i + 1);
            locate(&next, first, work->num_common, &own[(i + 1) % 2]);
            const Ahead ahead = {&own[(i + 1) % 2], work->num_common, offset};
            prefetch(&ahead, 0, BLOCK_KEYS, key_bytes);
        }
        if (i < 0) continue;
        const Work row = open_row_of(work, i);
        if (is_values) {
            sum_block(&row, &own[i % 2], &NOTHING, first, work->num_common);
        } else {
            score_block(&row, &own[i % 2], &NOTHING, first, work->num_common);
            softmax_block(&row, &own[i % 2], first);
        }
    }
}

static void attend_own_block(const Work *work, int64_t first) {
    static _Thread_local Located at;
    locate(work, first, 0, &at);
    if (work->num_common) at.num = work->num_common;
    prefetch_first(work, &at);
    if (work->num_common) {
        score_block(work, &at, &NOTHING, first, 0);
        attend_own_keys(work, first, 0);
        clear_sums(work);
        sum_block(work, &at, &NOTHING, first, 0);
        attend_own_keys(work, first, 1);
    } else {
        attend_block(work, &at, &NOTHING, first);
    }
}

// One block of a split row, or of several. A block that lies before all windows counts as done.
static void attend_one(const Work *work) {
    const int64_t first = work->block * BLOCK_KEYS;
    if (hidden_from_all(work, first) < BLOCK_KEYS) attend_own_block(work, first);
    if (work->num_rows == 1) {
        end_block(work);
        return;
    }
    for (int i = 0; i < work->num_rows; i++) {
        const Work row = open_row_of(work, i);
        end_block(&row);
    }
}

static int64_t attention_chunks(const void *opaque, const Step *step) {
    return step->num_chunks * ((const AttentionJob *)opaque)->num_kv_heads;
}

static void attend(const Work *work) {
#if HAS_AMX
    if (work->in_tiles) {
        configure_tiles();
        stack_tiles(work, &tile_scratch);
    } else
#endif
    {
        stack_queries(work);
    }
    if (work->block < 0) attend_all(work);
    else attend_one(work);
#if HAS_AMX
    if (work->in_tiles) tiles_release();
#endif
}

// Chunks of prompts in tiles go through one head after another, whose keys and values stay in the second cache. Those of
// decodes go through all heads of a page, which lie in memory together.
static void attention_chunk(const void *opaque, const Step *step, int64_t chunk) {
    const AttentionJob *job = opaque;
    const int by_head = is_for_tiles(job) && step->num_tokens > 2 * step->num_decodes;
    const int64_t at = by_head ? chunk % step->num_chunks : chunk / job->num_kv_heads;
    const int64_t entry = step->chunks[at], head = by_head ? chunk / step->num_chunks : chunk % job->num_kv_heads;
    const Work work = entry < 0 ? open_shared(job, step, entry, head) : open_work(job, step, entry, head);
    if (work.in_tiles && work.num_common) {  // a block of which rows share a part only
        for (int i = 0; i < work.num_rows; i++) {
            Work row = open_row_of(&work, i);
            row.first_stacked = 0;
            attend(&row);
        }
        return;
    }
    attend(&work);
}

const int64_t hw_max_stacked = MAX_STACKED;

const Kernel hw_attention = {.num_chunks = attention_chunks, .run_chunk = attention_chunk};
