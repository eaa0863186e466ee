// Norm and rotary embedding of queries and keys; keys and values go to their pages.

#include "qkv.h"

#include "pool.h"
#include "rms.h"

enum { TOKENS_PER_CHUNK = 8 };

// Norm (if there is a weight) and rotate one head of `dim` values; the result goes to `out`.
static void rotate_head(const Attention *job, const bf16 *head, const bf16 *weight, long token, bf16 *out) {
    const long dim = job->head_dim, half = dim / 2;
    float x[MAX_HEAD_DIM];
    for (long i = 0; i < dim; i += 16) _mm512_storeu_ps(x + i, load_bf16(head + i));
    if (weight) {
        const __m512 scale = _mm512_set1_ps(inverse_rms(x, dim, job->norm_eps));
        for (long i = 0; i < dim; i += 16) {
            const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(x + i), scale);
            _mm512_storeu_ps(x + i, _mm512_mul_ps(value, load_bf16(weight + i)));
        }
    }
    const float *cos = job->cos + token * half, *sin = job->sin + token * half;
    for (long i = 0; i < half; i += 16) {
        const __m512 first = _mm512_loadu_ps(x + i), second = _mm512_loadu_ps(x + half + i);
        const __m512 c = _mm512_loadu_ps(cos + i), s = _mm512_loadu_ps(sin + i);
        store_bf16(out + i, _mm512_fmsub_ps(first, c, _mm512_mul_ps(second, s)));
        store_bf16(out + half + i, _mm512_fmadd_ps(second, c, _mm512_mul_ps(first, s)));
    }
}

static void prepare_token(const Attention *job, long token) {
    const long dim = job->head_dim;
    bf16 *heads = job->qkv + token * qkv_stride(job);
    for (long head = 0; head < job->num_heads; head++) {
        rotate_head(job, heads + head * dim, job->q_norm, token, heads + head * dim);
    }
    for (long head = 0; head < job->num_kv_heads; head++) {
        const bf16 *key = heads + (job->num_heads + head) * dim;
        const bf16 *value = key + job->num_kv_heads * dim;
        const long slot = job->token_slots[token];
        rotate_head(job, key, job->k_norm, token, kv_token(job, KEY, head, slot));
        memcpy(kv_token(job, VALUE, head, slot), value, dim * sizeof(bf16));
    }
}

static void prepare_tokens(void *opaque, long chunk) {
    const Attention *job = opaque;
    const long end = (chunk + 1) * TOKENS_PER_CHUNK;
    for (long token = chunk * TOKENS_PER_CHUNK; token < end && token < job->num_tokens; token++) {
        prepare_token(job, token);
    }
}

void prepare_qkv(const Attention *job) {
    pool_run(prepare_tokens, (void *)job, (job->num_tokens + TOKENS_PER_CHUNK - 1) / TOKENS_PER_CHUNK, job->threads);
}
