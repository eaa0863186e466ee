// The job of hw_linear. `LinearJob` of linear_kernels.py has the same fields.

#pragma once

#include "packed.h"
#include "step.h"

// GATED: the blocks are those of gate and up in turn, and y = activation(gate) * up.
enum Mode { STORE = 0, ADD = 1, GATED = 2 };

typedef struct {
    const void *weights;  // packed
    const float *bias;    // NULL, or [blocks][16] in the order of the blocks
    const void *x;        // [rows] float32 [in_features], or its groups of 32 (packed.h)
    float *y;             // [rows][y_stride], of which this job writes (or adds to) out_features columns
    int64_t in_features, out_features, y_stride;
    int64_t format, mode;
    int64_t activation;  // of GATED, an enum Activation
    int64_t rows;  // TOKENS or SELECTED
    // GATED in tiles: where prompts' outputs go in place of y, as activations of the format; or NULL.
    void *activations;
    int64_t activation_format;
} LinearJob;

extern const Kernel hw_linear;

// For the layers of experts: blocks are multiplied two at a time, a pair.
int64_t num_pairs(const LinearJob *job);

// Pairs [begin, end) of the outputs of rows [first_row, first_row + rows), at most MOST_REGISTER_ROWS, in registers.
enum { MOST_REGISTER_ROWS = 96 };
void linear_in_registers(const LinearJob *job, int64_t first_row, int64_t rows, int64_t begin, int64_t end);
