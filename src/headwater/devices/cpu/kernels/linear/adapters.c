// LoRA adapters: y += scale * (x A^T) B^T for the rows that have one (devices/adapters.py).
//
// A step's rows with adapters are cut into tiles of one adapter each. `shrink` computes x A^T of a tile, A being the
// matrices of all projections that share x, one below the other. `expand` adds the product with each B to y. Both
// matrices are packed as those of hw_linear, sums are float32 in the order of the inputs, and so a row's bits do not
// depend on the other rows. Steps without adapters have no tiles, and these ops no chunks.

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-tree-ter", "no-tree-reassoc", "no-tree-pre")  // as in linear.c
#endif

#include "float_tile.h"
#include "linear.h"

enum {
    HEIGHT = 5,             // rows whose sums are in registers at the same time
    FEW_ROWS = WIDTH == 8 ? 3 : HEIGHT,  // so few that two blocks, or two halves of one, fit there as well
    BLOCKS_PER_CHUNK = 64,  // of outputs
    ROWS_PER_CHUNK = 4,
    PREFETCH_BLOCKS = 4,
};

// The matrix A of a slot at one site, and its rows: those of all projections. NULL: the slot adapts none of them.
typedef struct {
    const void *a;
    int64_t rank;
} AdapterInputs;

// The matrix B of a slot for one projection, whose inputs are `rank` columns of x A^T from `first` on. NULL: not adapted.
typedef struct {
    const void *b;
    int64_t first, rank;
    double scale;
} AdapterOutputs;

// Where a projection's outputs lie in y: block i of 16 at first_column + i * column_step.
typedef struct {
    int64_t first_column, column_step, out_features;
} AdapterColumns;

typedef struct {
    const AdapterInputs *inputs;  // [slots]
    const float *x;               // [T][in_features]
    float *s;                     // [T][width], in the order of step->adapter_rows
    int64_t in_features, width, format;
} AdapterShrinkJob;

typedef struct {
    const AdapterOutputs *outputs;  // [slots][num_projections]
    const AdapterColumns *columns;  // [num_projections]
    const float *s;                 // of the shrink
    float *y;                       // [T][y_stride]
    int64_t num_projections, num_blocks, width, y_stride, format;
} AdapterExpandJob;

typedef struct {
    const int32_t *rows;
    int64_t slot, first, count;
} RowTile;

INLINE RowTile tile_of(const Step *step, int64_t tile) {
    const int32_t *at = step->adapter_tiles + 3 * tile;
    return (RowTile){step->adapter_rows + at[1], at[0], at[1], at[2]};
}

// Sums down the columns of a block: `rows` rows with inputs [begin, end) of it. Constants where it is inlined.
INLINE void add_inputs(
    const int format, const int rows, const float *const *x, const char *w, int64_t begin, int64_t end,
    vf (*sums)[VECTORS]) {
    const int pairs = format == BF16 ? 2 : 1;  // inputs that lie side by side
    for (int64_t k = begin; k < end; k += pairs) {
#pragma GCC unroll 2
        for (int i = 0; i < pairs; i++) {
            vf weights[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) weights[v] = load_weights(format, w, k, i, v);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                const vf value = vf_splat(x[r][k + i]);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) sums[r][v] = vf_fma(value, weights[v], sums[r][v]);
            }
        }
    }
}

// The same for two streams of weights at once, `w[1]` being read `shift` inputs later: few rows are too few sums for the
// processor to compute at the same time.
INLINE void add_two(
    const int format, const int rows, const float *const *x, const char *const w[2], int64_t inputs, int64_t shift,
    vf (*sums)[VECTORS], vf (*others)[VECTORS]) {
    const int pairs = format == BF16 ? 2 : 1;
    for (int64_t k = 0; k < inputs; k += pairs) {
#pragma GCC unroll 2
        for (int i = 0; i < pairs; i++) {
            vf one[VECTORS], two[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) {
                one[v] = load_weights(format, w[0], k, i, v), two[v] = load_weights(format, w[1], k, i, v);
            }
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                const vf value = vf_splat(x[r][k + i]), other = vf_splat(x[r][k + i + shift]);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) {
                    sums[r][v] = vf_fma(value, one[v], sums[r][v]), others[r][v] = vf_fma(other, two[v], others[r][v]);
                }
            }
        }
    }
}

// Each number of x A^T is the sum of two halves of the inputs, however many rows there are.
INLINE void shrink_rows(
    const int format, const int rows, const float *const *x, const char *w, int64_t inputs, float *s, int64_t width) {
    vf halves[2][HEIGHT][VECTORS] = {0};
    const int64_t half = inputs / 4 * 2;
    const char *const both[2] = {w, w + block_bytes(format, half)};
    if (rows <= FEW_ROWS) {
        add_two(format, rows, x, both, half, half, halves[0], halves[1]);
        add_inputs(format, rows, x, w, 2 * half, inputs, halves[1]);
    } else {
        add_inputs(format, rows, x, w, 0, half, halves[0]);
        add_inputs(format, rows, x, w, half, inputs, halves[1]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) vf_store(s + r * width + v * WIDTH, halves[0][r][v] + halves[1][r][v]);
}

// y += scale * sums of one block, of which `cols` outputs exist (or more).
INLINE void add_block(
    const int rows, float *const *y, int64_t column, int64_t cols, float scale, vf (*const sums)[VECTORS]) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            const int64_t left = cols - v * WIDTH, n = left < 0 ? 0 : left < WIDTH ? left : WIDTH;
            float *at = y[r] + column + v * WIDTH;
            if (n == WIDTH) vf_store(at, vf_load(at) + vf_splat(scale) * sums[r][v]);
            else if (n > 0) vf_store_n(at, vf_load_n(at, n) + vf_splat(scale) * sums[r][v], n);
        }
}

// Add blocks [begin, end) of a projection's outputs to y.
INLINE void expand_rows(
    const int format, const int rows, const float *const *s, const AdapterOutputs *out, const AdapterColumns *columns,
    float *const *y, int64_t begin, int64_t end) {
    const int64_t bytes = block_bytes(format, out->rank);
    const float scale = (float)out->scale;
    for (int64_t block = begin; block < end;) {
        const char *w = (const char *)out->b + block * bytes;
        const int64_t column = columns->first_column + block * columns->column_step;
        const int64_t cols = columns->out_features - block * BLOCK_COLS;
        vf sums[2][HEIGHT][VECTORS] = {0};
        prefetch(w + PREFETCH_BLOCKS * bytes, 2 * bytes);
        if (rows <= FEW_ROWS && block + 1 < end) {
            const char *const both[2] = {w, w + bytes};
            add_two(format, rows, s, both, out->rank, 0, sums[0], sums[1]);
            add_block(rows, y, column + columns->column_step, cols - BLOCK_COLS, scale, sums[1]);
            block += 2;
        } else {
            add_inputs(format, rows, s, w, 0, out->rank, sums[0]);
            block++;
        }
        add_block(rows, y, column, cols, scale, sums[0]);
    }
}

// A function for each format, with a case for each number of rows.
#define UP_TO_HEIGHT(T) T(1) T(2) T(3) T(4) T(5)
#define SHRINK_CASE(n) case n: shrink_rows(FORMAT_HERE, n, x, w, inputs, s, width); break;
#define EXPAND_CASE(n) case n: expand_rows(FORMAT_HERE, n, s, out, columns, y, begin, end); break;
#define FORMAT(format)                                                                                            \
    static void shrink_##format(                                                                                 \
        int64_t rows, const float *const *x, const char *w, int64_t inputs, float *s, int64_t width) {           \
        enum { FORMAT_HERE = format };                                                                            \
        switch (rows) { UP_TO_HEIGHT(SHRINK_CASE) }                                                               \
    }                                                                                                             \
    static void expand_##format(                                                                                 \
        int64_t rows, const float *const *s, const AdapterOutputs *out, const AdapterColumns *columns,            \
        float *const *y, int64_t begin, int64_t end) {                                                            \
        enum { FORMAT_HERE = format };                                                                            \
        switch (rows) { UP_TO_HEIGHT(EXPAND_CASE) }                                                               \
    }
FORMAT(F32)
FORMAT(BF16)
FORMAT(F16)

// Rows of about equal height, as in linear.c.
INLINE int64_t next_height(int64_t left) {
    const int64_t tiles = (left + HEIGHT - 1) / HEIGHT;
    return (left + tiles - 1) / tiles;
}

static int64_t shrink_chunks(const void *opaque, const Step *step) {
    const AdapterShrinkJob *job = opaque;
    return step->num_adapter_tiles * (job->width / BLOCK_COLS);
}

static void shrink_chunk(const void *opaque, const Step *step, int64_t chunk) {
    const AdapterShrinkJob *job = opaque;
    const int64_t blocks = job->width / BLOCK_COLS, block = chunk % blocks, inputs = job->in_features;
    const RowTile tile = tile_of(step, chunk / blocks);
    const AdapterInputs *in = &job->inputs[tile.slot];
    if (!in->a || block * BLOCK_COLS >= in->rank) return;
    const char *w = (const char *)in->a + block * block_bytes((int)job->format, inputs);
    for (int64_t row = 0, height; row < tile.count; row += height) {
        height = next_height(tile.count - row);
        const float *x[HEIGHT];
        for (int64_t r = 0; r < height; r++) x[r] = job->x + tile.rows[row + r] * inputs;
        float *s = job->s + (tile.first + row) * job->width + block * BLOCK_COLS;
        if (job->format == F32) shrink_F32(height, x, w, inputs, s, job->width);
        else if (job->format == BF16) shrink_BF16(height, x, w, inputs, s, job->width);
        else shrink_F16(height, x, w, inputs, s, job->width);
    }
}

const Kernel hw_adapter_shrink = {.num_chunks = shrink_chunks, .run_chunk = shrink_chunk};

INLINE int64_t expand_pieces(const AdapterExpandJob *job) {
    return (job->num_blocks + BLOCKS_PER_CHUNK - 1) / BLOCKS_PER_CHUNK;
}

static int64_t expand_chunks(const void *opaque, const Step *step) {
    return step->num_adapter_tiles * expand_pieces(opaque);
}

// Blocks [begin, end) of one projection's outputs, for all rows of a tile.
static void expand_blocks(
    const AdapterExpandJob *job, const RowTile *tile, const AdapterOutputs *out, const AdapterColumns *columns,
    int64_t begin, int64_t end) {
    for (int64_t row = 0, height; row < tile->count; row += height) {
        height = next_height(tile->count - row);
        const float *s[HEIGHT];
        float *y[HEIGHT];
        for (int64_t r = 0; r < height; r++) {
            s[r] = job->s + (tile->first + row + r) * job->width + out->first;
            y[r] = job->y + tile->rows[row + r] * job->y_stride;
        }
        if (job->format == F32) expand_F32(height, s, out, columns, y, begin, end);
        else if (job->format == BF16) expand_BF16(height, s, out, columns, y, begin, end);
        else expand_F16(height, s, out, columns, y, begin, end);
    }
}

static void expand_chunk(const void *opaque, const Step *step, int64_t chunk) {
    const AdapterExpandJob *job = opaque;
    const int64_t pieces = expand_pieces(job), begin = chunk % pieces * BLOCKS_PER_CHUNK;
    const RowTile tile = tile_of(step, chunk / pieces);
    for (int64_t p = 0, first = 0; p < job->num_projections; p++) {
        const AdapterOutputs *out = &job->outputs[tile.slot * job->num_projections + p];
        const int64_t count = num_blocks(job->columns[p].out_features), from = begin > first ? begin - first : 0;
        const int64_t left = begin + BLOCKS_PER_CHUNK - first, to = left < count ? left : count;
        if (out->b && from < to) expand_blocks(job, &tile, out, &job->columns[p], from, to);
        first += count;
    }
}

const Kernel hw_adapter_expand = {.num_chunks = expand_chunks, .run_chunk = expand_chunk};

// hw_linear in steps where no row has an adapter, and in the others.
static int64_t without_chunks(const void *job, const Step *step) {
    return step->num_adapter_tiles ? 0 : hw_linear.num_chunks(job, step);
}

static int64_t with_chunks(const void *job, const Step *step) {
    return step->num_adapter_tiles ? hw_linear.num_chunks(job, step) : 0;
}

static void linear_chunk(const void *job, const Step *step, int64_t chunk) { hw_linear.run_chunk(job, step, chunk); }

const Kernel hw_linear_without_adapters = {.num_chunks = without_chunks, .run_chunk = linear_chunk, .has_ordered_rows = HAS_AMX};
const Kernel hw_linear_with_adapters = {.num_chunks = with_chunks, .run_chunk = linear_chunk, .has_ordered_rows = HAS_AMX};

// y = activation(gate) * up of products with adapters. The blocks of gate and up alternate, as hw_linear stores them.
typedef struct {
    const float *halves;  // [T][2 * whole blocks]
    float *y;             // [T][size]
    int64_t size;
    int64_t activation;  // an enum Activation
} MultiplyHalvesJob;

static int64_t halves_chunks(const void *job, const Step *step) {
    (void)job;
    return step->num_adapter_tiles ? (step->num_tokens + ROWS_PER_CHUNK - 1) / ROWS_PER_CHUNK : 0;
}

static void halves_chunk(const void *opaque, const Step *step, int64_t chunk) {
    const MultiplyHalvesJob *job = opaque;
    const int64_t end = (chunk + 1) * ROWS_PER_CHUNK, width = 2 * BLOCK_COLS * num_blocks(job->size);
    for (int64_t row = chunk * ROWS_PER_CHUNK; row < end && row < step->num_tokens; row++) {
        const float *halves = job->halves + row * width;
        for (int64_t col = 0; col < job->size; col += WIDTH) {
            const float *at = halves + col / BLOCK_COLS * 2 * BLOCK_COLS + col % BLOCK_COLS;
            const int64_t n = job->size - col < WIDTH ? job->size - col : WIDTH;
            const vf y = vf_gated(job->activation, vf_load(at), vf_load(at + BLOCK_COLS));
            vf_store_n(job->y + row * job->size + col, y, n);
        }
    }
}

const Kernel hw_multiply_halves = {.num_chunks = halves_chunks, .run_chunk = halves_chunk};
