// Activations as integers with a scale for each group of 32 inputs: what products with quantised weights take. Those of
// products in tiles are bfloat16, also for bfloat16 weights.

#include "quantize.h"

#include "activations.h"
#include "step.h"

typedef struct {
    const float *x;  // [rows][in_features]
    void *y;         // [rows][in_features / 32] Group16 for Q8_0, Group8 for fewer bits; tiles: bfloat16 (packed.h)
    int64_t in_features, format;
    int64_t rows;  // TOKENS or SELECTED
    int64_t only_decodes;  // 1: what made x has written the activations of prompts
} QuantizeJob;

enum { CHUNK_NUMBERS = 1 << 13 };

#if HAS_AMX

static void round_row(const QuantizeJob *job, int64_t row) {
    const int format = (int)job->format;
    const int64_t inputs = job->in_features;
    bf16 *y = (bf16 *)((char *)job->y + row * activation_bytes(format, inputs));
    for (int64_t k = 0; k < inputs; k += GROUP, y += activation_bytes(format, GROUP) / (int64_t)sizeof *y) {
        round_group(format, job->x + row * inputs + k, inputs - k, y);
    }
}

#endif

// The factor to integers up to `largest`, and the scale back. A group that is not finite gets the scale NaN: its
// products are NaN, as they would be in float32.
INLINE float scale_of(const float *x, float largest, float *inverse) {
    vf most = vf_zero(), check = vf_zero();
    for (int i = 0; i < GROUP; i += WIDTH) {
        const vf value = vf_load(x + i);
        most = vf_max(most, vf_abs(value));
        check = vf_fma(value, vf_zero(), check);
    }
    const float top = vf_max_of(most), bad = vf_sum(check);
    *inverse = top > 1e-30f ? largest / top : 0.0f;
    return top / largest + bad;
}

// Integers from -largest to largest, also where x is not finite.
INLINE vi scaled(const float *x, float inverse, float largest) {
    return vi_round(vf_max(vf_min(vf_load(x) * vf_splat(inverse), vf_splat(largest)), vf_splat(-largest)));
}

static void quantize_to_16(const float *x, Group16 *y) {
    float inverse;
    y->scale = scale_of(x, 32767.0f, &inverse);
    for (int i = 0; i < GROUP; i += WIDTH) {
        const vi values = scaled(x + i, inverse, 32767.0f);
        vi_store_16((uint16_t *)y->values + i, values & vi_splat(0xffff));
    }
}

static void quantize_to_8(const float *x, Group8 *y) {
    float inverse;
    y->scale = scale_of(x, 127.0f, &inverse);
    for (int half = 0; half < 2; half++) {
        vi sum = vi_splat(0);
        for (int i = half * 16; i < half * 16 + 16; i += WIDTH) {
            const vi values = scaled(x + i, inverse, 127.0f);
            vi_store_8(y->values + i, values);
            sum += values;
        }
        y->sums[half] = (int16_t)vf_sum(vf_from_int(sum));  // at most 2032, exact
    }
    y->scaled_sum = y->scale * (float)(y->sums[0] + y->sums[1]);
}

void activations_for_registers(int format, const float *x, int64_t in_features, void *y) {
    if (format <= F16) memcpy(y, x, (size_t)in_features * sizeof *x);
    for (int64_t g = 0; format > F16 && g < in_features / GROUP; g++) {
        if (format == Q8_0) quantize_to_16(x + g * GROUP, (Group16 *)y + g);
        else quantize_to_8(x + g * GROUP, (Group8 *)y + g);
    }
}

static void quantize_row(const QuantizeJob *job, int64_t row) {
    const int format = (int)job->format;
    const int64_t inputs = job->in_features;
    activations_for_registers(
        format, job->x + row * inputs, inputs, (char *)job->y + row * register_bytes(format, inputs));
}

static int64_t rows_of(const QuantizeJob *job, const Step *step) {
    return job->only_decodes ? num_decodes_of(step, (int)job->rows) : num_rows_of(step, (int)job->rows);
}

static int64_t rows_per_chunk(const QuantizeJob *job) {
    return job->in_features < CHUNK_NUMBERS ? CHUNK_NUMBERS / job->in_features : 1;
}

static int64_t num_chunks(const void *job_, const Step *step) {
    const QuantizeJob *job = job_;
    const int64_t rows = rows_of(job, step), per_chunk = rows_per_chunk(job);
    return (rows + per_chunk - 1) / per_chunk;
}

static void run_chunk(const void *job_, const Step *step, int64_t chunk) {
    const QuantizeJob *job = job_;
    const int64_t rows = rows_of(job, step), per_chunk = rows_per_chunk(job);
    const int64_t begin = chunk * per_chunk, end = begin + per_chunk < rows ? begin + per_chunk : rows;
    for (int64_t row = begin; row < end; row++) {
#if HAS_AMX
        if (row >= num_decodes_of(step, (int)job->rows)) {
            round_row(job, row);
            continue;
        }
#endif
        quantize_row(job, row);
    }
}

const Kernel hw_quantize = {.num_chunks = num_chunks, .run_chunk = run_chunk, .has_ordered_rows = HAS_AMX};
