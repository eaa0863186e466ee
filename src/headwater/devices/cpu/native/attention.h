// One step's attention, which attention.c and qkv.c compute. `AttentionJob` of native_library.py has the same fields.

#pragma once

#include "tile.h"

#define MAX_HEAD_DIM 256

enum { KEY = 0, VALUE = 1 };

typedef struct {
    // the step
    const int32_t *query_starts;  // [rows + 1]
    const int32_t *context_lens;  // [rows]
    const int32_t *page_tables;   // [rows][table_stride]
    const int64_t *token_slots;   // [num_tokens] page * page_size + offset
    const int64_t *chunks;        // [num_chunks] row << 32 | first query of the row
    const float *cos, *sin;       // [num_tokens][head_dim / 2]
    bf16 *kv;                     // [pages][layers][2][num_kv_heads][page_size][head_dim]
    int64_t num_tokens, num_chunks, table_stride, queries_per_chunk;
    // the model
    int64_t num_heads, num_kv_heads, head_dim, num_layers, page_size;
    float norm_eps, scale;
    int64_t threads;
    // the layer
    int64_t layer;
    bf16 *qkv;  // [num_tokens][(num_heads + 2 num_kv_heads) head_dim]; queries are rotated in place
    const bf16 *q_norm, *k_norm;  // [head_dim] or NULL
    bf16 *out;                    // [num_tokens][num_heads head_dim]
    int64_t works_per_claim;      // set by hw_attention
} Attention;

static inline long qkv_stride(const Attention *job) {
    return (job->num_heads + 2 * job->num_kv_heads) * job->head_dim;
}

// Where a page's keys or values of one layer and head begin.
static inline bf16 *kv_page(const Attention *job, int which, long head, long page) {
    const long run = job->page_size * job->head_dim;
    return job->kv + (((page * job->num_layers + job->layer) * 2 + which) * job->num_kv_heads + head) * run;
}

static inline bf16 *kv_token(const Attention *job, int which, long head, long slot) {
    return kv_page(job, which, head, slot / job->page_size) + slot % job->page_size * job->head_dim;
}
