// RMSNorm of the float32 residual stream, and what happens to queries, keys and values before attention.

#include <math.h>

#include "attention.h"
#include "pool.h"

enum { ROWS_PER_CHUNK = 8 };

static float inverse_rms(const float *x, long size, float eps) {
    __m512 squares = _mm512_setzero_ps();
    for (long i = 0; i < size; i += 16) {
        const __mmask16 mask = size - i >= 16 ? 0xffff : (__mmask16)((1u << (size - i)) - 1);
        const __m512 value = _mm512_maskz_loadu_ps(mask, x + i);
        squares = _mm512_fmadd_ps(value, value, squares);
    }
    return 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / size + eps);
}

typedef struct {
    const float *x;
    const bf16 *weight;
    bf16 *y;
    long rows, size;
    float eps;
} Norm;

static void norm_rows(void *opaque, long chunk) {
    const Norm *job = opaque;
    const long end = (chunk + 1) * ROWS_PER_CHUNK;
    for (long row = chunk * ROWS_PER_CHUNK; row < end && row < job->rows; row++) {
        const float *x = job->x + row * job->size;
        const __m512 scale = _mm512_set1_ps(inverse_rms(x, job->size, job->eps));
        for (long i = 0; i < job->size; i += 16) {
            const __mmask16 mask = job->size - i >= 16 ? 0xffff : (__mmask16)((1u << (job->size - i)) - 1);
            const __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), scale);
            const __m512 weight = widen(_mm256_maskz_loadu_epi16(mask, job->weight + i));
            _mm256_mask_storeu_epi16(job->y + row * job->size + i, mask, narrow(_mm512_mul_ps(value, weight)));
        }
    }
}

// y[rows][size] (bf16) = x / rms(x) * weight, x in float32.
void hw_rms_norm(const float *x, const bf16 *weight, bf16 *y, long rows, long size, float eps, int threads) {
    Norm job = {.x = x, .weight = weight, .y = y, .rows = rows, .size = size, .eps = eps};
    pool_run(norm_rows, &job, (rows + ROWS_PER_CHUNK - 1) / ROWS_PER_CHUNK, threads);
}

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
    const long end = (chunk + 1) * ROWS_PER_CHUNK;
    for (long token = chunk * ROWS_PER_CHUNK; token < end && token < job->num_tokens; token++) {
        prepare_token(job, token);
    }
}

void prepare_qkv(const Attention *job) {
    pool_run(prepare_tokens, (void *)job, (job->num_tokens + ROWS_PER_CHUNK - 1) / ROWS_PER_CHUNK, job->threads);
}
