// What this machine can do at best: bytes read from memory, and fused multiply-adds in registers. One thread's part.

#include "simd.h"

float read_bytes(const float *from, int64_t count) {
    vi sums[8] = {0};
    for (int64_t i = 0; i + 8 * WIDTH <= count; i += 8 * WIDTH)
        for (int j = 0; j < 8; j++) sums[j] ^= vi_load(from + i + j * WIDTH);
    for (int j = 1; j < 8; j++) sums[0] ^= sums[j];
    return vf_sum((vf)sums[0]);
}

enum { CHAINS = 10 };  // latency times units of the cores that we know

float multiply_add(int64_t count) {  // 2 * WIDTH * CHAINS * count floating-point operations
    vf sums[CHAINS];
    for (int j = 0; j < CHAINS; j++) sums[j] = vf_splat((float)j);
    const vf a = vf_splat(0.999f), b = vf_splat(0.001f);
    for (int64_t i = 0; i < count; i++)
#pragma GCC unroll 10
        for (int j = 0; j < CHAINS; j++) sums[j] = vf_fma(sums[j], a, b);
    for (int j = 1; j < CHAINS; j++) sums[0] += sums[j];
    return vf_sum(sums[0]);
}

int64_t operations_per_count(void) { return 2 * WIDTH * CHAINS; }
