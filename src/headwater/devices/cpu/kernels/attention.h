// The job of prepare_qkv and of attention: one layer. `AttentionJob` of attention_kernels.py has the same fields.

#pragma once

#include "simd_amx.h"
#include "step.h"

// Query heads that share a KV head are stacked. In tiles there are more of them for each key that is packed.
enum { MAX_HEAD_DIM = 256, MAX_SHARING = 96, MAX_STACKED = HAS_AMX ? 384 : 96, BLOCK_KEYS = 256 };
enum KVDtype { KV_F32 = 0, KV_BF16 = 1, KV_F16 = 2, KV_E4M3 = 3, KV_E5M2 = 4 };
enum { KEY = 0, VALUE = 1 };

typedef struct {
    // the model
    int64_t num_heads, num_kv_heads, head_dim;  // head_dim is a multiple of 8, at most MAX_HEAD_DIM
    int64_t kv_dtype, page_size, page_bytes, layer_offset;  // where the layer lies in a page, in bytes (kv_memory.py)
    float norm_eps, scale;
    // the layer
    float *qkv;                          // [T][(num_heads + 2 num_kv_heads) head_dim]; queries are rotated in place
    const float *q_norm, *k_norm;        // [head_dim] or NULL
    int64_t norms_whole;                 // the norms are of all heads together: [num_heads head_dim] and so on
    const float *squares;                // [T][2] sums over ranks, for norms of all heads of all ranks; NULL: of these
    int64_t num_normed[2];               // numbers of queries and of keys that the sums are of
    const int32_t *pair_order;           // [head_dim] dims in the order of rotary pairs; NULL: as they are
    int64_t window;                      // keys that a query sees, its own included; 0: all before it
    const float *sinks;                  // [num_heads] a score more in each softmax, of no value; NULL: none
    const float *cos, *sin;              // [T][head_dim / 2]
    float *out;                          // [T][num_heads head_dim]
    // rows that are split: a slot for each query and block of keys, at most MAX_PARTIALS (attention_kernels.py)
    float *partial_sums;                 // [slots][num_heads][head_dim]
    float *partial_stats;                // [slots][num_heads][2]: largest score, total of the weights
    int32_t *num_done;                   // [slots][num_kv_heads] zeros, and zeros again after each step
} AttentionJob;
