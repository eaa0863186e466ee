// What a CPU can do at best, measured as the kernels run: by chunks of an op of hw_run (machine_speed.py).

#include "simd.h"
#include "step.h"

enum { CHAINS = 12 };  // latency times units of the cores that we know

// The compiler has to take a register's value for a new one, or it would multiply once and only add.
#if defined(__aarch64__)
#define MAY_CHANGE(x) __asm__ volatile("" : "+w"(x))
#else
#define MAY_CHANGE(x) __asm__ volatile("" : "+x"(x))
#endif

typedef struct {
    const int64_t *addresses;  // [num_chunks] of `size` bytes each; not read by the arithmetic
    float *sums;               // [num_chunks], so that nothing is optimised away
    int64_t size, num_chunks;  // arithmetic: rounds of hw_operations_a_round
} FloorJob;

static int64_t floor_chunks(const void *job, const Step *step) {
    (void)step;
    return ((const FloorJob *)job)->num_chunks;
}

// Read every byte once.
static void read_chunk(const void *opaque, const Step *step, int64_t chunk) {
    (void)step;
    const FloorJob *job = opaque;
    const float *from = (const float *)(intptr_t)job->addresses[chunk];
    vf sums[8] = {{0}};
    for (int64_t i = 0; i + 8 * WIDTH <= job->size / 4; i += 8 * WIDTH) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) sums[j] = (vf)((vi)sums[j] ^ vi_load(from + i + j * WIDTH));
    }
#pragma GCC unroll 8
    for (int j = 1; j < 8; j++) sums[0] = (vf)((vi)sums[0] ^ (vi)sums[j]);
    job->sums[chunk] = sums[0][0];
}

// Fused multiply-adds in registers.
static void fma_chunk(const void *opaque, const Step *step, int64_t chunk) {
    (void)step;
    const FloorJob *job = opaque;
    vf sums[CHAINS];
    for (int j = 0; j < CHAINS; j++) sums[j] = vf_splat((float)j);  // all different, or the compiler would keep one
    const vf a = vf_splat(0.999f), b = vf_splat(0.001f);
    for (int64_t i = 0; i < job->size; i++) {
#pragma GCC unroll 12
        for (int j = 0; j < CHAINS; j++) sums[j] = vf_fma(sums[j], a, b);
    }
    for (int j = 1; j < CHAINS; j++) sums[0] += sums[j];
    job->sums[chunk] = vf_sum(sums[0]);
}

// Products of uint8 and int8 in registers, as products with blocks of weights compute them.
static void dot_chunk(const void *opaque, const Step *step, int64_t chunk) {
    (void)step;
    const FloorJob *job = opaque;
    dots sums[CHAINS];
    for (int j = 0; j < CHAINS; j++) sums[j] = dots_zero();
    vi ones = vi_splat(0x01010101);
    for (int64_t i = 0; i < job->size; i++) {
#pragma GCC unroll 12
        for (int j = 0; j < CHAINS; j++) {
            MAY_CHANGE(ones);
            sums[j] = dot4(sums[j], ones, ones);
        }
    }
    vi total = dots_sum(sums[0]);
#pragma GCC unroll 12
    for (int j = 1; j < CHAINS; j++) total += dots_sum(sums[j]);
    job->sums[chunk] = (float)total[0];
}

const Kernel hw_read_floor = {.num_chunks = floor_chunks, .run_chunk = read_chunk};
const Kernel hw_fma_floor = {.num_chunks = floor_chunks, .run_chunk = fma_chunk};
const Kernel hw_dot_floor = {.num_chunks = floor_chunks, .run_chunk = dot_chunk};

// Multiplications and additions of a thread's round, each counted.
int64_t hw_operations_a_round(int64_t is_dot) { return 2 * CHAINS * WIDTH * (is_dot ? 4 : 1); }
