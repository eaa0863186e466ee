// What becomes of the sums of a product: stored, added to the residual, or activation(gate) * up.

#pragma once

#include "activations.h"
#include "linear.h"

// Outputs of blocks `block` and (if there are two) block + 1, for rows from `first_row` on.
typedef struct {
    const LinearJob *job;
    const float *bias;  // of the first block, or NULL
    int64_t first_row, block, blocks;
} Outputs;

INLINE int64_t first_col(const Outputs *outputs) {
    return outputs->block / (outputs->job->mode == GATED ? 2 : 1) * BLOCK_COLS;
}

// Write `cols` outputs of a row, whose sums count in `unit`.
INLINE void finish_block(
    const LinearJob *job, const float *sums, const vf unit, const float *bias, float *y, int64_t cols) {
    for (int64_t at = 0; at < cols; at += WIDTH) {
        const int64_t n = cols - at < WIDTH ? cols - at : WIDTH;
        vf value = vf_load(sums + at) * unit;
        if (bias) value += vf_load(bias + at);
        if (job->mode == ADD) value += vf_load_n(y + at, n);
        vf_store_n(y + at, value, n);
    }
}

// The same of all blocks of row `row`, behind the first one. `is_half`: activations for a next product go out as bfloat16.
INLINE void finish_row(const int is_half, const Outputs *outputs, const float *const sums[2], const vf unit, int64_t row) {
    const LinearJob *job = outputs->job;
    const float *bias = outputs->bias;
    const int64_t first = first_col(outputs), left = job->out_features - first;
    float *y = job->y + (outputs->first_row + row) * job->y_stride + first;
    if (job->mode != GATED) {
        for (int64_t b = 0; b < outputs->blocks; b++) {
            const int64_t cols = left - b * BLOCK_COLS;
            finish_block(job, sums[b], unit, bias ? bias + b * BLOCK_COLS : NULL, y + b * BLOCK_COLS,
                         cols < BLOCK_COLS ? cols : BLOCK_COLS);
        }
        return;
    }
    const int is_rough = is_half && job->activations;
    vf out[VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; i++) {
        vf g = vf_load(sums[0] + i * WIDTH) * unit, u = vf_load(sums[1] + i * WIDTH) * unit;
        if (bias) g += vf_load(bias + i * WIDTH), u += vf_load(bias + BLOCK_COLS + i * WIDTH);
        out[i] = is_rough ? vf_rough_gated(job->activation, g, u) : vf_gated(job->activation, g, u);
    }
#if HAS_AMX
    if (is_rough) {
        const int format = (int)job->activation_format;
        bf16 *group = group_of(job->activations, format, job->out_features, outputs->first_row + row, first);
        round_half_group(format, (const float *)out, group + first % GROUP);
        return;
    }
#endif
    for (int i = 0; i < VECTORS && i * WIDTH < left; i++) {
        vf_store_n(y + i * WIDTH, out[i], left - i * WIDTH < WIDTH ? left - i * WIDTH : WIDTH);
    }
}

// Ask for the memory that rows [begin, end) will be written to.
INLINE void fetch_outputs(const Outputs *outputs, int64_t begin, int64_t end) {
    const LinearJob *job = outputs->job;
    const int64_t first = first_col(outputs);
    for (int64_t row = outputs->first_row + begin; row < outputs->first_row + end; row++) {
#if HAS_AMX
        if (job->mode == GATED && job->activations) {
            const int format = (int)job->activation_format;
            prefetch_to_write(group_of(job->activations, format, job->out_features, row, first) + first % GROUP);
            continue;
        }
#endif
        const float *y = job->y + row * job->y_stride + first;
        for (int64_t b = 0; b < (job->mode == GATED ? 1 : outputs->blocks); b++) prefetch_to_write(y + b * BLOCK_COLS);
    }
}
