// Paged causal attention with an online softmax (FlashAttention, arXiv 2205.14135), prefill chunks and decodes alike.
//
// One chunk of work is some queries of one row and one KV head. The query heads that share a KV head are stacked, so
// that a block of keys is read and packed once for all of them and both products run on tiles of tile.h.

#include <math.h>

#include "pool.h"
#include "qkv.h"

enum { BLOCK_KEYS = 64, MAX_STACKED = 96 };  // keys per block; query heads times queries per chunk

typedef struct {
    _Alignas(64) bf16 queries[MAX_STACKED * MAX_HEAD_DIM];
    _Alignas(64) bf16 keys[BLOCK_KEYS * MAX_HEAD_DIM];    // packed [BLOCK_KEYS / 32][dim / 2][32][2]
    _Alignas(64) bf16 values[BLOCK_KEYS * MAX_HEAD_DIM];  // packed [dim / 32][BLOCK_KEYS / 2][32][2]
    _Alignas(64) float scores[(BLOCK_KEYS / TILE_COLS) * MAX_STACKED * TILE_COLS];  // [blocks of 32 keys][stacked][32]
    _Alignas(64) bf16 weights[MAX_STACKED * BLOCK_KEYS];
    _Alignas(64) float sums[(MAX_HEAD_DIM / TILE_COLS) * MAX_STACKED * TILE_COLS];  // [blocks of 32 dims][stacked][32]
    float largest[MAX_STACKED], total[MAX_STACKED];
} Scratch;

static _Thread_local Scratch scratch;

typedef struct {
    const bf16 *keys[BLOCK_KEYS], *values[BLOCK_KEYS];
    int num;
} Located;

// rows[i][j] -> columns[j][i], 16 x 16 pairs of values, as 32-bit numbers.
static inline void transpose_pairs(__m512i x[16]) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
        y[i + 4] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
        y[i + 8] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
        y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        x[i] = _mm512_shuffle_i32x4(y[i], y[i + 4], 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 4], 0xdd);
        x[i + 4] = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0x88);
        x[i + 12] = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0xdd);
    }
}

// Pack keys [first, first + num) of a row for scores = queries x keys^T. Missing keys are zero.
static void pack_keys(const Attention *job, const bf16 *const *tokens, int num) {
    const long dim = job->head_dim;
    for (int key = 0; key < (num + 15) / 16 * 16; key += 16) {
        bf16 *packed = scratch.keys + key / TILE_COLS * TILE_COLS * dim + key % TILE_COLS * 2;
        for (long d = 0; d < dim; d += 32) {
            __m512i x[16];
            for (int i = 0; i < 16; i++) {
                x[i] = key + i < num ? _mm512_loadu_si512(tokens[key + i] + d) : _mm512_setzero_si512();
            }
            transpose_pairs(x);
            for (int i = 0; i < 16; i++) _mm512_store_si512(packed + (d / 2 + i) * TILE_COLS * 2, x[i]);
        }
    }
}

// Pack values for sums += weights x values. Missing values are zero: a weight of 0 times NaN would be NaN.
static void pack_values(const Attention *job, const bf16 *const *tokens, int num) {
    static const uint16_t pick[64] = {
        0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
        16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61,
        30, 62, 31, 63};
    const __m512i low = _mm512_loadu_si512(pick), high = _mm512_loadu_si512(pick + 32);
    for (long d = 0; d < job->head_dim; d += TILE_COLS) {
        bf16 *packed = scratch.values + d * BLOCK_KEYS;
        for (int key = 0; key < num; key += 2) {
            const __m512i first = _mm512_loadu_si512(tokens[key] + d);
            const __m512i second = key + 1 < num ? _mm512_loadu_si512(tokens[key + 1] + d) : _mm512_setzero_si512();
            _mm512_store_si512(packed + key * TILE_COLS, _mm512_permutex2var_epi16(first, low, second));
            _mm512_store_si512(packed + key * TILE_COLS + 32, _mm512_permutex2var_epi16(first, high, second));
        }
    }
}

// out[blocks][stacked][32] += a[stacked][depth] x packed, for `cols` columns in blocks of 32.
static void multiply(const bf16 *a, long a_stride, const bf16 *packed, long block_size, long depth, int stacked,
                     long cols, float *out) {
    const int tile_rows = tile_rows_for(stacked);
    for (long col = 0; col < cols; col += TILE_COLS) {
        for (int row = 0; row < stacked; row += tile_rows) {
            const int num = stacked - row < tile_rows ? stacked - row : tile_rows;
            multiply_tile(num, a + row * a_stride, a_stride, packed + col / TILE_COLS * block_size, depth,
                          out + (col / TILE_COLS * MAX_STACKED + row) * TILE_COLS);
        }
    }
}

// Turn one stacked query's scores into weights; the first `num` keys are visible to it.
static void softmax_row(const Attention *job, int row, int num, int padded) {
    const __m512 scale = _mm512_set1_ps(job->scale), hidden = _mm512_set1_ps(-INFINITY);
    __m512 scores[BLOCK_KEYS / 16], largest = hidden;
    __mmask16 visible[BLOCK_KEYS / 16];
    for (int i = 0; i * 16 < padded; i++) {
        const int left = num - i * 16;
        visible[i] = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
        const float *at = scratch.scores + (i / 2 * MAX_STACKED + row) * TILE_COLS + i % 2 * 16;
        scores[i] = _mm512_mask_mul_ps(hidden, visible[i], _mm512_load_ps(at), scale);
        largest = _mm512_max_ps(largest, scores[i]);
    }
    const float before = scratch.largest[row], block = _mm512_reduce_max_ps(largest);
    const float after = block > before ? block : before;
    __m512 total = _mm512_setzero_ps();
    for (int i = 0; i * 16 < padded; i++) {
        const __m512 exponent = _mm512_sub_ps(scores[i], _mm512_set1_ps(after));
        const __m512 weight = _mm512_maskz_mov_ps(visible[i], exp512(exponent));
        total = _mm512_add_ps(total, weight);
        store_bf16(scratch.weights + row * BLOCK_KEYS + i * 16, weight);
    }
    scratch.largest[row] = after;
    if (after != before) {
        const __m512 shrink = exp512(_mm512_set1_ps(before - after));
        scratch.total[row] *= _mm512_cvtss_f32(shrink);
        for (long d = 0; d < job->head_dim; d += 16) {
            float *at = scratch.sums + (d / TILE_COLS * MAX_STACKED + row) * TILE_COLS + d % TILE_COLS;
            _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), shrink));
        }
    }
    scratch.total[row] += _mm512_reduce_add_ps(total);
}

// Where the keys and values of a row's tokens [first, first + num) lie.
static void locate(const Attention *job, const int32_t *pages, long head, long first, int num, Located *at) {
    const long dim = job->head_dim;
    long page = first / job->page_size, offset = first % job->page_size;
    at->num = num > 0 ? num : 0;
    for (int i = 0; i < num; page++, offset = 0) {
        const bf16 *keys = kv_page(job, KEY, head, pages[page]), *values = kv_page(job, VALUE, head, pages[page]);
        for (; offset < job->page_size && i < num; offset++, i++) {
            at->keys[i] = keys + offset * dim;
            at->values[i] = values + offset * dim;
        }
    }
}

static void prefetch(const Attention *job, const bf16 *const *tokens, int num) {
    for (int i = 0; i < num; i++) {
        for (long d = 0; d < job->head_dim; d += 32) _mm_prefetch(tokens[i] + d, _MM_HINT_T1);
    }
}

// Attend to one block. The next one's keys and values are on their way from memory meanwhile.
static void attend_block(const Attention *job, const Located *at, const Located *next, long first, int stacked,
                         long first_position) {
    const int num = at->num;
    const int padded = (num + 15) / 16 * 16, per_kv = (int)(job->num_heads / job->num_kv_heads);
    pack_keys(job, at->keys, num);
    prefetch(job, next->keys, next->num);
    const long score_cols = (padded + TILE_COLS - 1) / TILE_COLS * TILE_COLS;
    for (long col = 0; col < score_cols; col += TILE_COLS) {
        memset(scratch.scores + col * MAX_STACKED, 0, stacked * TILE_COLS * sizeof(float));
    }
    multiply(scratch.queries, job->head_dim, scratch.keys, TILE_COLS * job->head_dim, job->head_dim, stacked,
             score_cols, scratch.scores);
    for (int row = 0; row < stacked; row++) {
        const long visible = first_position + row / per_kv + 1 - first;
        softmax_row(job, row, visible < num ? (int)visible : num, padded);
    }
    pack_values(job, at->values, num);
    prefetch(job, next->values, next->num);
    multiply(scratch.weights, BLOCK_KEYS, scratch.values, TILE_COLS * BLOCK_KEYS, (num + 1) / 2 * 2, stacked,
             job->head_dim, scratch.sums);
}

// Some queries of one row and one KV head, with all keys they see.
typedef struct {
    long row, head, first_token, first_position, num_keys;
    int stacked;
    const int32_t *pages;
} Work;

static Work open_work(const Attention *job, long index) {
    const long chunk = job->chunks[index / job->num_kv_heads], row = chunk >> 32, first_query = chunk & 0xffffffff;
    const long start = job->query_starts[row], num_row_queries = job->query_starts[row + 1] - start;
    const long left = num_row_queries - first_query;
    const long queries = left < job->queries_per_chunk ? left : job->queries_per_chunk;
    const long first_position = job->context_lens[row] - num_row_queries + first_query;
    return (Work){
        .row = row,
        .head = index % job->num_kv_heads,
        .first_token = start + first_query,
        .first_position = first_position,
        .num_keys = first_position + queries,
        .stacked = (int)(queries * (job->num_heads / job->num_kv_heads)),
        .pages = job->page_tables + row * job->table_stride,
    };
}

static Located block_of(const Attention *job, const Work *work, long first) {
    Located at;
    const long left = work->num_keys - first;
    locate(job, work->pages, work->head, first, left < BLOCK_KEYS ? (int)left : BLOCK_KEYS, &at);
    return at;
}

static void start_work(const Attention *job, const Work *work) {
    const long dim = job->head_dim, per_kv = job->num_heads / job->num_kv_heads;
    for (int i = 0; i < work->stacked; i++) {
        const bf16 *heads = job->qkv + (work->first_token + i / per_kv) * qkv_stride(job);
        memcpy(scratch.queries + i * dim, heads + (work->head * per_kv + i % per_kv) * dim, dim * sizeof(bf16));
        scratch.largest[i] = -INFINITY;
        scratch.total[i] = 0;
    }
    for (long d = 0; d < dim; d += TILE_COLS) {
        memset(scratch.sums + d * MAX_STACKED, 0, work->stacked * TILE_COLS * sizeof(float));
    }
}

static void finish_work(const Attention *job, const Work *work) {
    const long dim = job->head_dim, per_kv = job->num_heads / job->num_kv_heads;
    for (int i = 0; i < work->stacked; i++) {
        const __m512 scale = _mm512_set1_ps(1.0f / scratch.total[i]);
        const long token = work->first_token + i / per_kv, head = work->head * per_kv + i % per_kv;
        bf16 *out = job->out + (token * job->num_heads + head) * dim;
        for (long d = 0; d < dim; d += 16) {
            const float *at = scratch.sums + (d / TILE_COLS * MAX_STACKED + i) * TILE_COLS + d % TILE_COLS;
            store_bf16(out + d, _mm512_mul_ps(_mm512_load_ps(at), scale));
        }
    }
}

// Do some works one after another, so that the first keys of the next one can be fetched during the last of this.
static void attend(void *opaque, long claim) {
    const Attention *job = opaque;
    const long all = job->num_chunks * job->num_kv_heads, limit = (claim + 1) * job->works_per_claim;
    const long end = limit < all ? limit : all;
    long index = claim * job->works_per_claim;
    Work work = open_work(job, index);
    Located now = block_of(job, &work, 0);
    prefetch(job, now.values, now.num);
    for (; index < end; index++) {
        const Work following = index + 1 < end ? open_work(job, index + 1) : (Work){.num_keys = 0};
        start_work(job, &work);
        for (long first = 0; first < work.num_keys; first += BLOCK_KEYS) {
            const int is_last = first + BLOCK_KEYS >= work.num_keys;
            const Located next = is_last ? block_of(job, &following, 0) : block_of(job, &work, first + BLOCK_KEYS);
            attend_block(job, &now, &next, first, work.stacked, work.first_position);
            now = next;
        }
        finish_work(job, &work);
        work = following;
    }
}

// Attention of one layer: rotate, write the KV, attend. Needs head_dim to be a multiple of 32, at most MAX_HEAD_DIM.
void hw_attention(Attention *job) {
    prepare_qkv(job);
    const long works = job->num_chunks * job->num_kv_heads;
    // A claim is at most one row's heads, and there are enough claims for the threads to end together.
    const long per_claim = works / (job->threads * 8);
    job->works_per_claim = per_claim < 1 ? 1 : per_claim < job->num_kv_heads ? per_claim : job->num_kv_heads;
    pool_run(attend, job, (works + job->works_per_claim - 1) / job->works_per_claim, (int)job->threads);
}

// How many queries one chunk may hold.
long hw_queries_per_chunk(long heads_per_kv_head) { return MAX_STACKED / heads_per_kv_head; }
