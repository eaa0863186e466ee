// A layer of experts, of which each token goes through a few (arXiv 1701.06538): the choice, the order of the rows, the
// products of each expert that has rows, and the weighted sum of a token's results.
//
// A row's numbers depend neither on other rows nor on the place of the row: products are those of linear.c, in
// registers, and the sum adds a token's experts from the heaviest to the lightest.

#include "linear.h"

#include "quantize.h"

enum {
    ROWS_PER_CHUNK = 4,
    MIN_CHUNK_BYTES = 24 << 10,  // of weights for one row: some microseconds
    MOST_CHUNKS = 512,
};

// --- the choice ----------------------------------------------------------------------------------------

typedef struct {
    const float *logits;  // [T][num_experts]
    int32_t *experts;     // [T][per_token], the most probable first; of equal ones the lower number first
    float *weights;       // [T][per_token]
    int64_t num_experts, per_token;
    int64_t renormalises;  // whether a token's weights add up to 1; else they are probabilities among all experts
} RouteJob;

// NaN is the least logit, so that every token has `per_token` different experts. Its weights are NaN.
INLINE float order_of(float logit) { return logit == logit ? logit : -INFINITY; }

static void choose_experts(const RouteJob *job, const float *logits, int32_t *experts, float *weights) {
    float last = INFINITY;
    int64_t last_expert = -1;
    for (int64_t j = 0; j < job->per_token; j++) {
        int64_t best = -1;
        for (int64_t e = 0; e < job->num_experts; e++) {
            const float logit = order_of(logits[e]);
            if (j > 0 && (logit > last || (logit == last && e <= last_expert))) continue;  // was chosen
            if (best < 0 || logit > order_of(logits[best])) best = e;
        }
        experts[j] = (int32_t)best, weights[j] = logits[best];
        last = order_of(logits[best]), last_expert = best;
    }
}

// The sum of e^(x - largest); `out` may be NULL.
static float exp_all(const float *x, float largest, float *out, int64_t num) {
    float sum = 0;
    for (int64_t i = 0; i < num; i += WIDTH) {
        float lanes[WIDTH];
        const int64_t n = num - i < WIDTH ? num - i : WIDTH;
        vf_store(lanes, vf_exp(vf_load_n(x + i, n) - vf_splat(largest)));
        for (int64_t lane = 0; lane < n; lane++) {
            sum += lanes[lane];
            if (out) out[i + lane] = lanes[lane];
        }
    }
    return sum;
}

static void route_row(const RouteJob *job, int64_t row) {
    const float *logits = job->logits + row * job->num_experts;
    int32_t *experts = job->experts + row * job->per_token;
    float *weights = job->weights + row * job->per_token;
    choose_experts(job, logits, experts, weights);
    const float largest = weights[0];
    const float all = job->renormalises ? 0 : exp_all(logits, largest, NULL, job->num_experts);
    const float chosen = exp_all(weights, largest, weights, job->per_token);
    const float total = job->renormalises ? chosen : all;
    for (int64_t j = 0; j < job->per_token; j++) weights[j] /= total;
}

static int64_t chunks_of_rows(int64_t rows) { return (rows + ROWS_PER_CHUNK - 1) / ROWS_PER_CHUNK; }

static int64_t end_of_chunk(int64_t chunk, int64_t rows) {
    return (chunk + 1) * ROWS_PER_CHUNK < rows ? (chunk + 1) * ROWS_PER_CHUNK : rows;
}

static int64_t token_chunks(const void *job, const Step *step) {
    (void)job;
    return chunks_of_rows(step->num_tokens);
}

static void route_chunk(const void *job, const Step *step, int64_t chunk) {
    const int64_t end = end_of_chunk(chunk, step->num_tokens);
    for (int64_t row = chunk * ROWS_PER_CHUNK; row < end; row++) route_row(job, row);
}

const Kernel hw_route_experts = {.num_chunks = token_chunks, .run_chunk = route_chunk};

// --- the order of the rows -----------------------------------------------------------------------------

// Rows [first, first + count) of the places, all of one expert.
typedef struct {
    int32_t expert, first, count;
} ExpertTile;

// Each of the T * per_token rows gets a place: those of one expert lie together, their tokens in order.
typedef struct {
    const int32_t *experts;  // [T][per_token]
    int32_t *tokens;         // [T * per_token] of the row at each place
    int32_t *places;         // [T][per_token]
    ExpertTile *tiles;       // [T * per_token] or fewer
    int64_t *num_tiles;
    int64_t *ends;  // [num_experts] scratch
    int64_t num_experts, per_token;
} GroupJob;

static int64_t one_chunk(const void *job, const Step *step) {
    (void)job;
    return step->num_tokens > 0;
}

static void group_chunk(const void *opaque, const Step *step, int64_t chunk) {
    (void)chunk;
    const GroupJob *job = opaque;
    const int64_t rows = step->num_tokens * job->per_token;
    memset(job->ends, 0, (size_t)job->num_experts * sizeof *job->ends);
    for (int64_t row = 0; row < rows; row++) job->ends[job->experts[row]]++;
    int64_t first = 0, num_tiles = 0;
    for (int64_t e = 0; e < job->num_experts; e++) {
        const int64_t count = job->ends[e], parts = (count + MOST_REGISTER_ROWS - 1) / MOST_REGISTER_ROWS;
        for (int64_t part = 0; part < parts; part++) {
            const int64_t begin = part * count / parts, end = (part + 1) * count / parts;
            job->tiles[num_tiles++] = (ExpertTile){(int32_t)e, (int32_t)(first + begin), (int32_t)(end - begin)};
        }
        job->ends[e] = first;
        first += count;
    }
    *job->num_tiles = num_tiles;
    for (int64_t row = 0; row < rows; row++) {
        const int64_t place = job->ends[job->experts[row]]++;
        job->places[row] = (int32_t)place;
        job->tokens[place] = (int32_t)(row / job->per_token);
    }
}

const Kernel hw_group_experts = {.num_chunks = one_chunk, .run_chunk = group_chunk};

// --- activations ---------------------------------------------------------------------------------------

typedef struct {
    const float *x;         // [T][in_features], or of each place
    const int32_t *tokens;  // whose row each place takes; NULL: its own
    void *y;                // [T * per_token] rows of activations for products in registers (packed.h)
    int64_t in_features, format, per_token;
} ExpertInputsJob;

static int64_t place_chunks(const void *job, const Step *step) {
    return chunks_of_rows(step->num_tokens * ((const ExpertInputsJob *)job)->per_token);
}

static void inputs_chunk(const void *opaque, const Step *step, int64_t chunk) {
    const ExpertInputsJob *job = opaque;
    const int64_t end = end_of_chunk(chunk, step->num_tokens * job->per_token);
    for (int64_t place = chunk * ROWS_PER_CHUNK; place < end; place++) {
        const int64_t row = job->tokens ? job->tokens[place] : place;
        char *y = (char *)job->y + place * register_bytes((int)job->format, job->in_features);
        activations_for_registers((int)job->format, job->x + row * job->in_features, job->in_features, y);
    }
}

const Kernel hw_expert_inputs = {.num_chunks = place_chunks, .run_chunk = inputs_chunk};

// --- products ------------------------------------------------------------------------------------------

typedef struct {
    LinearJob product;  // of the first expert; x and y have a row for each place
    const ExpertTile *tiles;
    const int64_t *num_tiles;
    int64_t expert_bytes, expert_biases;  // from one expert's weights to the next one's; from bias to bias
    int64_t per_token;
} ExpertsJob;

// How a tile's outputs are cut. It never changes a result.
static int64_t pairs_per_chunk(const ExpertsJob *job, const Step *step) {
    const int64_t tiles = *job->num_tiles, rows = step->num_tokens * job->per_token / tiles;
    const int64_t bytes = 2 * block_bytes((int)job->product.format, job->product.in_features);
    const int64_t share = tiles * num_pairs(&job->product) * bytes / MOST_CHUNKS;
    const int64_t pairs = (share > MIN_CHUNK_BYTES ? share : MIN_CHUNK_BYTES) / (bytes * (1 + rows / 4));
    return pairs > 1 ? pairs : 1;
}

static int64_t chunks_per_tile(const ExpertsJob *job, const Step *step) {
    const int64_t per_chunk = pairs_per_chunk(job, step);
    return (num_pairs(&job->product) + per_chunk - 1) / per_chunk;
}

static int64_t product_chunks(const void *opaque, const Step *step) {
    const ExpertsJob *job = opaque;
    return step->num_tokens ? *job->num_tiles * chunks_per_tile(job, step) : 0;
}

static void product_chunk(const void *opaque, const Step *step, int64_t chunk) {
    const ExpertsJob *job = opaque;
    const int64_t per_tile = chunks_per_tile(job, step), per_chunk = pairs_per_chunk(job, step);
    const ExpertTile *tile = &job->tiles[chunk / per_tile];
    LinearJob product = job->product;
    product.weights = (const char *)product.weights + tile->expert * job->expert_bytes;
    if (product.bias) product.bias += tile->expert * job->expert_biases;
    const int64_t begin = chunk % per_tile * per_chunk, left = num_pairs(&product) - begin;
    linear_in_registers(&product, tile->first, tile->count, begin, begin + (left < per_chunk ? left : per_chunk));
}

const Kernel hw_experts = {.num_chunks = product_chunks, .run_chunk = product_chunk};

// --- the sum -------------------------------------------------------------------------------------------

typedef struct {
    const float *x;         // [T * per_token][size], a row for each place
    const float *weights;   // [T][per_token]
    const int32_t *places;  // [T][per_token]
    float *y;               // [T][size]
    int64_t size, per_token, mode;  // STORE or ADD
} SumExpertsJob;

static void sum_row(const SumExpertsJob *job, int64_t row) {
    const float *weights = job->weights + row * job->per_token;
    const int32_t *places = job->places + row * job->per_token;
    float *y = job->y + row * job->size;
    for (int64_t col = 0; col < job->size; col += WIDTH) {
        const int64_t n = job->size - col < WIDTH ? job->size - col : WIDTH;
        vf sum = vf_zero();
        for (int64_t j = 0; j < job->per_token; j++) {
            sum = vf_fma(vf_splat(weights[j]), vf_load_n(job->x + places[j] * job->size + col, n), sum);
        }
        if (job->mode == ADD) sum += vf_load_n(y + col, n);
        vf_store_n(y + col, sum, n);
    }
}

static void sum_chunk(const void *job, const Step *step, int64_t chunk) {
    const int64_t end = end_of_chunk(chunk, step->num_tokens);
    for (int64_t row = chunk * ROWS_PER_CHUNK; row < end; row++) sum_row(job, row);
}

const Kernel hw_sum_experts = {.num_chunks = token_chunks, .run_chunk = sum_chunk};
