// Rotary embedding (arXiv 2104.09864), halves of a head rotated against each other; QK-norm; the way of K and V into
// their pages.

#include "kv_pages.h"
#include "norm.h"
#include "simd_amx.h"

typedef struct {
    const float *inv_freq;  // [half]; pairs of zero are not rotated and have no factor
    float *cos, *sin;       // [T][half]
    int64_t half;
    float factor;
} RotaryAnglesJob;

static int64_t token_chunks(const void *job, const Step *step) {
    (void)job;
    const int64_t per_chunk = rows_of_chunk(step->num_tokens);
    return (step->num_tokens + per_chunk - 1) / per_chunk;
}

// cos and sin of an angle >= 0, in double: after rounding they are the same on every instruction set.
INLINE void cos_sin(double angle, double *cos, double *sin) {
    const int32_t quarter = (int32_t)(angle * 0.63661977236758134308 + 0.5);
    const double r = angle - quarter * 1.57079632673412561417 - quarter * 6.07710050650619224932e-11, r2 = r * r;
    const double s = r + r * r2 * (-1. / 6 + r2 * (1. / 120 + r2 * (-1. / 5040 + r2 * (1. / 362880 - r2 / 39916800))));
    const double c =
        1 + r2 * (-1. / 2 + r2 * (1. / 24 + r2 * (-1. / 720 + r2 * (1. / 40320 - r2 * (1. / 3628800 - r2 / 479001600)))));
    const double first = quarter & 1 ? s : c, second = quarter & 1 ? c : s;
    *cos = (quarter + 1) & 2 ? -first : first;
    *sin = quarter & 2 ? -second : second;
}

static void angles_chunk(const void *opaque, const Step *step, int64_t chunk) {
    const RotaryAnglesJob *job = opaque;
    const int64_t per_chunk = rows_of_chunk(step->num_tokens), end = (chunk + 1) * per_chunk;
    for (int64_t token = chunk * per_chunk; token < end && token < step->num_tokens; token++) {
        const float position = (float)step->positions[token];
        for (int64_t i = 0; i < job->half; i++) {
            const float factor = job->inv_freq[i] == 0 ? 1.0f : job->factor;
            double cos, sin;
            cos_sin((double)(position * job->inv_freq[i]), &cos, &sin);
            job->cos[token * job->half + i] = (float)cos * factor;
            job->sin[token * job->half + i] = (float)sin * factor;
        }
    }
}

const Kernel hw_rotary_angles = {.num_chunks = token_chunks, .run_chunk = angles_chunk, .has_ordered_rows = HAS_AMX};

// Where ranks share the norm of all heads: each token's sums of squares over this rank's queries and keys.
typedef struct {
    const float *qkv;  // [T][stride]
    float *squares;    // [T][2]
    int64_t stride, first_key;
    int64_t num_counted[2];  // numbers of queries and of keys; no keys where another rank counts the same ones
} SquareSumsJob;

static void squares_chunk(const void *opaque, const Step *step, int64_t chunk) {
    const SquareSumsJob *job = opaque;
    const int64_t per_chunk = rows_of_chunk(step->num_tokens), end = (chunk + 1) * per_chunk;
    for (int64_t token = chunk * per_chunk; token < end && token < step->num_tokens; token++) {
        const float *queries = job->qkv + token * job->stride;
        job->squares[2 * token] = square_sum(queries, job->num_counted[0]);
        job->squares[2 * token + 1] = square_sum(queries + job->first_key, job->num_counted[1]);
    }
}

const Kernel hw_square_sums = {.num_chunks = token_chunks, .run_chunk = squares_chunk, .has_ordered_rows = HAS_AMX};

// Norm a token's queries (0) or keys (1) by all heads together, in place.
static void norm_heads(const AttentionJob *job, float *x, const float *weight, int64_t token, int which) {
    const int64_t size = (which ? job->num_kv_heads : job->num_heads) * job->head_dim;
    if (!job->squares) {
        norm_row(x, weight, x, size, job->norm_eps);
        return;
    }
    scale_row(x, weight, x, size, scale_of_squares(job->squares[2 * token + which], job->num_normed[which], job->norm_eps));
}

// Norm (if there is a weight) and rotate one head, in place. Rotated heads have their dims in the order of pairs, whose
// first dims come first.
static void rotate_head(const AttentionJob *job, float *x, const float *weight, int64_t token) {
    const int64_t half = job->head_dim / 2;
    if (weight) norm_row(x, weight, x, job->head_dim, job->norm_eps);
    if (job->pair_order) {
        float ordered[MAX_HEAD_DIM];
        for (int64_t d = 0; d < job->head_dim; d++) ordered[d] = x[job->pair_order[d]];
        memcpy(x, ordered, (size_t)job->head_dim * sizeof *x);
    }
    const float *cos = job->cos + token * half, *sin = job->sin + token * half;
    for (int64_t i = 0; i < half; i += WIDTH) {
        const int64_t n = half - i < WIDTH ? half - i : WIDTH;
        const vf first = vf_load_n(x + i, n), second = vf_load_n(x + half + i, n);
        const vf c = vf_load_n(cos + i, n), s = vf_load_n(sin + i, n);
        vf_store_n(x + i, vf_fma(first, c, vf_zero() - second * s), n);
        vf_store_n(x + half + i, vf_fma(second, c, first * s), n);
    }
}

INLINE void write_head_as(const int dtype, const float *x, int64_t dim, uint8_t *to, int8_t *exponent) {
    vf inverse = vf_splat(1.0f);
    if (kv_is_scaled(dtype)) {
        *exponent = exponent_for(x, dim);
        inverse = vf_splat(power_of_two(-*exponent));
    }
    for (int64_t d = 0; d < dim; d += WIDTH) store_kv(dtype, to, d, vf_load_n(x + d, dim - d < WIDTH ? dim - d : WIDTH), dim - d, inverse);
}

static void write_head(int64_t dtype, const float *x, int64_t dim, uint8_t *to, int8_t *exponent) {
    switch (dtype) {
        case KV_F32: memcpy(to, x, (size_t)dim * sizeof *x); break;
        case KV_BF16: write_head_as(KV_BF16, x, dim, to, exponent); break;
        case KV_F16: write_head_as(KV_F16, x, dim, to, exponent); break;
        case KV_E4M3: write_head_as(KV_E4M3, x, dim, to, exponent); break;
        case KV_E5M2: write_head_as(KV_E5M2, x, dim, to, exponent); break;
    }
}

static void prepare_token(const AttentionJob *job, const Step *step, int64_t token, int64_t row) {
    const int64_t dim = job->head_dim, position = step->positions[token], offset = position % job->page_size;
    uint8_t *page = page_of(job, step, step->page_tables[row * step->table_stride + position / job->page_size]);
    const int64_t to_value = value_offset(job), to_value_exponent = job->num_kv_heads * job->page_size;
    float *heads = job->qkv + token * qkv_stride(job);
    const float *q_norm = job->q_norm, *k_norm = job->k_norm;
    if (job->norms_whole) {
        norm_heads(job, heads, q_norm, token, 0);
        norm_heads(job, heads + job->num_heads * dim, k_norm, token, 1);
        q_norm = k_norm = NULL;
    }
    for (int64_t head = 0; head < job->num_heads; head++) rotate_head(job, heads + head * dim, q_norm, token);
    for (int64_t head = 0; head < job->num_kv_heads; head++) {
        float *key = heads + (job->num_heads + head) * dim, *value = key + job->num_kv_heads * dim;
        uint8_t *to = key_at(job, page, head, offset);
        int8_t *exponent = exponent_at(job, page, head, offset);
        rotate_head(job, key, k_norm, token);
        write_head(job->kv_dtype, key, dim, to, exponent);
        write_head(job->kv_dtype, value, dim, to + to_value, exponent + to_value_exponent);
    }
}

static void prepare_chunk(const void *opaque, const Step *step, int64_t chunk) {
    const AttentionJob *job = opaque;
    const int64_t per_chunk = rows_of_chunk(step->num_tokens), first = chunk * per_chunk, end = first + per_chunk;
    int64_t row = 0, above = step->num_rows;  // the row of `first`: query_starts[row] <= first < query_starts[above]
    while (above - row > 1) {
        const int64_t middle = (row + above) / 2;
        if (step->query_starts[middle] <= first) row = middle;
        else above = middle;
    }
    for (int64_t token = first; token < end && token < step->num_tokens; token++) {
        while (step->query_starts[row + 1] <= token) row++;
        prepare_token(job, step, token, row);
    }
}

const Kernel hw_prepare_qkv = {.num_chunks = token_chunks, .run_chunk = prepare_chunk, .has_ordered_rows = HAS_AMX};
