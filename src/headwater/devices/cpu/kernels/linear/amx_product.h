// Products of bfloat16 and of weights of 4 to 8 bits by AMX, for rows of prompts: any number, in one order of the inputs.
//
// Tiles multiply pairs of bfloat16 and add in float32 over all inputs, so no sum has to be scaled. A weight of a few
// bits is code * scale + minimum, computed in float16 and rounded to bfloat16 (amx_weights.h). Activations are rounded
// to bfloat16 once; for bfloat16 and Q8_0 they are the sum of two, what the rounding left being the second.

#pragma once

#include "linear.h"

// The rows of the two tiles for which this thread has configured its registers; zeros before the first product.
typedef struct {
    int64_t first, second;
} TileRows;

#if HAS_AMX

enum { AMX_CHUNK_ROWS = 256, AMX_CHUNK_BYTES = 1 << 20 };  // of activations: half of a core's second cache

INLINE int is_for_amx(const int format) { return converts_activations(format); }

// The most rows of a chunk, a multiple of two tiles'.
INLINE int64_t amx_chunk_rows(const LinearJob *job) {
    const int64_t rows = AMX_CHUNK_BYTES / activation_bytes((int)job->format, job->in_features);
    const int64_t whole = rows / (2 * AMX_ROWS) * (2 * AMX_ROWS);
    return whole < 4 * AMX_ROWS ? 4 * AMX_ROWS : whole < AMX_CHUNK_ROWS ? whole : AMX_CHUNK_ROWS;
}

// The outputs of blocks `block` and (if `blocks` is 2) block + 1, whose weights are `w`, for rows from `first_row`.
// `ahead` bytes behind the weights in use are fetched from memory.
void amx_product(
    const LinearJob *job, int64_t first_row, int64_t rows, const char *const w[2], int64_t block, int64_t blocks,
    int64_t ahead, TileRows *tile_rows);

#else

enum { AMX_CHUNK_ROWS = 0 };

INLINE int is_for_amx(const int format) { return (void)format, 0; }

#endif
