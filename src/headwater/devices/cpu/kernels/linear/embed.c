// Rows of a packed matrix as float32: those of the step's token ids, or all of them.

#include "step.h"
#include "unpack.h"

typedef struct {
    const void *weights;  // packed, a row for each token id from first_token on
    float *y;             // [T][in_features]; zeros for other tokens
    int64_t in_features, format;
    int64_t first_token, num_tokens;
    float scale;
} EmbedJob;

enum { CHUNK_TOKENS = 16 };

static int64_t num_chunks(const void *job, const Step *step) {
    (void)job;
    return (step->num_tokens + CHUNK_TOKENS - 1) / CHUNK_TOKENS;
}

static void run_chunk(const void *job_, const Step *step, int64_t chunk) {
    const EmbedJob *job = job_;
    const int64_t width = job->in_features, stride = block_bytes((int)job->format, width);
    const int64_t begin = chunk * CHUNK_TOKENS, left = step->num_tokens - begin;
    for (int64_t t = begin; t < begin + (left < CHUNK_TOKENS ? left : CHUNK_TOKENS); t++) {
        const int64_t row = step->token_ids[t] - job->first_token;
        float *y = job->y + t * width;
        if (row >= 0 && row < job->num_tokens) unpack_row(job->format, job->weights, stride, width, row, y);
        else memset(y, 0, (size_t)width * sizeof(float));
        if (job->scale == 1.0f) continue;
        for (int64_t i = 0; i < width; i++) y[i] *= job->scale;
    }
}

const Kernel hw_embed = {.num_chunks = num_chunks, .run_chunk = run_chunk, .has_ordered_rows = HAS_AMX};

// Outputs [0, num_rows) of packed weights into float32[num_rows][in_features].
void hw_unpack(
    int64_t format, const void *packed, int64_t block_stride, int64_t in_features, int64_t num_rows, float *out) {
    for (int64_t row = 0; row < num_rows; row++) {
        unpack_row(format, packed, block_stride, in_features, row, out + row * in_features);
    }
}
