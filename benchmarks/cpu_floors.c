// What a CPU can do at best, measured the same way as the kernels: by chunks of an op of hw_run.

#include "simd.h"
#include "step.h"

typedef struct {
    const float *x;       // [num_chunks][size]
    float *sums;          // [num_chunks]
    int64_t size, num_chunks;
} FloorJob;

static int64_t floor_chunks(const void *job, const Step *step) {
    (void)step;
    return ((const FloorJob *)job)->num_chunks;
}

// Read every number once.
static void read_chunk(const void *opaque, const Step *step, int64_t chunk) {
    (void)step;
    const FloorJob *job = opaque;
    const float *x = job->x + chunk * job->size;
    vf sums[8] = {{0}};
    for (int64_t i = 0; i < job->size; i += 8 * WIDTH) {
        for (int j = 0; j < 8; j++) sums[j] = sums[j] + vf_load(x + i + j * WIDTH);
    }
    for (int j = 1; j < 8; j++) sums[0] = sums[0] + sums[j];
    job->sums[chunk] = vf_sum(sums[0]);
}

// 12 * WIDTH fused multiply-adds for each of `size` numbers, all in registers.
static void fma_chunk(const void *opaque, const Step *step, int64_t chunk) {
    (void)step;
    const FloorJob *job = opaque;
    const vf x = vf_splat(job->x[0]), y = vf_splat(job->x[1]);
    vf sums[12];
    for (int j = 0; j < 12; j++) sums[j] = vf_splat((float)j);  // all different, or the compiler would keep one
    for (int64_t i = 0; i < job->size; i++) {
#pragma GCC unroll 12
        for (int j = 0; j < 12; j++) sums[j] = vf_fma(x, y, sums[j]);
    }
    for (int j = 1; j < 12; j++) sums[0] = sums[0] + sums[j];
    job->sums[chunk] = vf_sum(sums[0]);
}

const Kernel hw_read_floor = {floor_chunks, read_chunk};
const Kernel hw_fma_floor = {floor_chunks, fma_chunk};
