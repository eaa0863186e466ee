// RMSNorm of the float32 residual stream.

#include "pool.h"
#include "rms.h"

enum { ROWS_PER_CHUNK = 8 };

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
