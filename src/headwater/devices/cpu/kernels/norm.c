// RMSNorm (arXiv 1910.07467) of float32 rows, and the rows that logits are wanted for.

#include "norm.h"

#include "activations.h"
#include "step.h"

typedef struct {
    const float *x, *weight;  // [rows][size], [size]
    float *y;                 // [rows][size]
    int64_t size;
    float eps;
    int64_t rows;
    void *activations;  // with AMX: where prompts' rows go in place of y, as activations of the format; or NULL
    int64_t activation_format;
} RmsNormJob;

#if HAS_AMX
static void norm_to_activations(const RmsNormJob *job, int64_t row) {
    const int format = (int)job->activation_format;
    const float *x = job->x + row * job->size;
    const vf scale = vf_splat(norm_scale(x, job->size, job->eps));
    for (int64_t k = 0; k < job->size; k += GROUP) {
        _Alignas(64) float group[GROUP];
        for (int i = 0; i < GROUP; i += WIDTH) {
            vf_store(group + i, vf_load(x + k + i) * scale * vf_load(job->weight + k + i));
        }
        round_group(format, group, GROUP, group_of(job->activations, format, job->size, row, k));
    }
}
#endif

static int64_t rms_norm_chunks(const void *opaque, const Step *step) {
    const int64_t rows = num_rows_of(step, (int)((const RmsNormJob *)opaque)->rows), per_chunk = rows_of_chunk(rows);
    return (rows + per_chunk - 1) / per_chunk;
}

static void rms_norm_chunk(const void *opaque, const Step *step, int64_t chunk) {
    const RmsNormJob *job = opaque;
    const int64_t rows = num_rows_of(step, (int)job->rows), per_chunk = rows_of_chunk(rows), end = (chunk + 1) * per_chunk;
    for (int64_t row = chunk * per_chunk; row < end && row < rows; row++) {
#if HAS_AMX
        if (job->activations && row >= num_decodes_of(step, (int)job->rows)) {
            norm_to_activations(job, row);
            continue;
        }
#endif
        norm_row(job->x + row * job->size, job->weight, job->y + row * job->size, job->size, job->eps);
    }
}

const Kernel hw_rms_norm = {.num_chunks = rms_norm_chunks, .run_chunk = rms_norm_chunk, .has_ordered_rows = HAS_AMX};

static void add_rms_norm_chunk(const void *opaque, const Step *step, int64_t chunk) {
    const RmsNormJob *job = opaque;
    const int64_t rows = num_rows_of(step, (int)job->rows), per_chunk = rows_of_chunk(rows), end = (chunk + 1) * per_chunk;
    for (int64_t row = chunk * per_chunk; row < end && row < rows; row++) {
        add_norm_row(job->x + row * job->size, job->weight, job->y + row * job->size, job->size, job->eps);
    }
}

const Kernel hw_add_rms_norm = {.num_chunks = rms_norm_chunks, .run_chunk = add_rms_norm_chunk};  // to what y holds

typedef struct {
    const float *x;  // [T][size]
    float *y;        // [S][size]
    int64_t size;
} SelectRowsJob;

static int64_t select_chunks(const void *job, const Step *step) {
    (void)job;
    const int64_t per_chunk = rows_of_chunk(step->num_selected);
    return (step->num_selected + per_chunk - 1) / per_chunk;
}

static void select_chunk(const void *opaque, const Step *step, int64_t chunk) {
    const SelectRowsJob *job = opaque;
    const int64_t per_chunk = rows_of_chunk(step->num_selected), end = (chunk + 1) * per_chunk;
    for (int64_t row = chunk * per_chunk; row < end && row < step->num_selected; row++) {
        memcpy(job->y + row * job->size, job->x + step->selected[row] * job->size, (size_t)job->size * sizeof(float));
    }
}

const Kernel hw_select_rows = {.num_chunks = select_chunks, .run_chunk = select_chunk};
