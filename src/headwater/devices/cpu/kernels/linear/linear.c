// y = x W^T + b for packed weights. A chunk of work is some blocks of outputs and at most CHUNK_ROWS rows.

// These passes of gcc move products far from the additions that use them: the sums of a tile leave their registers.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-tree-ter", "no-tree-reassoc", "no-tree-pre")
#endif

#include "linear.h"

#include "amx_product.h"
#include "code_tile.h"
#include "float_tile.h"
#include "int8_tile.h"
#include "outputs.h"

enum {
    CHUNK_ROWS = MOST_REGISTER_ROWS,
    PIECE_BYTES = 1 << 14,        // of a block at a time, if more than one tile of rows reads it: half of a small L1
    MIN_CHUNK_BYTES = 24 << 10,   // of weights for one row: some microseconds
    MOST_CHUNKS = 256,
    SHORT_PAIR_BYTES = 16 << 10,  // of two blocks, so short that the processor's own prefetcher hardly gets going
    PREFETCH_BYTES = 2 << 10,
};

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// What tiles of a chunk share: rows from `first_row`, inputs [begin, end), one or two blocks, and their sums
// [rows][16]. The last tile prefetches the weights `ahead` bytes behind its own.
typedef struct {
    const LinearJob *job;
    const char *w[2];
    int64_t first_row, begin, end, ahead;
    float *sums[2];
} Tile;

// Bytes from the start of a block to input `k` (a multiple of what the format stores together).
INLINE int64_t offset_of(const int format, int64_t k) { return block_bytes(format, k); }

INLINE void run_tile(
    const int format, const int rows, const int blocks, const Tile *tile, int64_t row, int64_t ahead) {
    const LinearJob *job = tile->job;
    const int64_t x_bytes = register_bytes(format, job->in_features), offset = offset_of(format, tile->begin);
    const char *x = (const char *)job->x + (tile->first_row + row) * x_bytes + register_bytes(format, tile->begin);
    const char *const w[2] = {tile->w[0] + offset, tile->w[blocks - 1] + offset};
    float *const out[2] = {tile->sums[0] + row * BLOCK_COLS, tile->sums[blocks - 1] + row * BLOCK_COLS};
    const int64_t inputs = tile->end - tile->begin, groups = inputs / GROUP, stride = job->in_features / GROUP;
    if (format <= F16) float_tile(format, rows, blocks, (const float *)x, job->in_features, w, inputs, ahead, out);
    else if (format == Q8_0) int8_tile(rows, blocks, (const Group16 *)x, stride, w, groups, ahead, out);
    else code_tile(format, rows, blocks, (const Group8 *)x, stride, w, groups, ahead, out);
}

// A function for each format and number of blocks: all `rows` rows in tiles of about equal height, so that 16 rows are
// 6 + 5 + 5, not 6 + 6 + 4. The height of a tile is a constant in its code.
#define UP_TO_1(T) T(1)
#define UP_TO_2(T) UP_TO_1(T) T(2)
#define UP_TO_3(T) UP_TO_2(T) T(3)
#define UP_TO_4(T) UP_TO_3(T) T(4)
#define UP_TO_5(T) UP_TO_4(T) T(5)
#define UP_TO_6(T) UP_TO_5(T) T(6)
#define UP_TO_8(T) UP_TO_6(T) T(7) T(8)
#define UP_TO_12(T) UP_TO_8(T) T(9) T(10) T(11) T(12)
#define EXPANDED(most, T) UP_TO_##most(T)
#define CASES(most, T) EXPANDED(most, T)

#define TILES(format, blocks, most)                                                 \
    static void tiles_##format##_##blocks(const Tile *tile, int64_t rows) {         \
        enum { FORMAT_HERE = format, BLOCKS_HERE = blocks };                        \
        for (int64_t row = 0, count; row < rows; row += count) {                    \
            const int64_t left = rows - row, tiles = (left + (most) - 1) / (most);  \
            count = (left + tiles - 1) / tiles;                                     \
            const int64_t ahead = count == left ? tile->ahead : 0;                  \
            switch (count) { CASES(most, CASE) }                                    \
        }                                                                           \
    }
#define CASE(n) case n: run_tile(FORMAT_HERE, n, BLOCKS_HERE, tile, row, ahead); break;

#define FORMAT(format, most, most_of_two) TILES(format, 1, most) TILES(format, 2, most_of_two)
FORMAT(F32, FLOAT_ROWS, FLOAT_ROWS_OF_TWO)
FORMAT(F16, FLOAT_ROWS, FLOAT_ROWS_OF_TWO)
FORMAT(BF16, BF16_ROWS, FLOAT_ROWS_OF_TWO)
FORMAT(Q8_0, INT8_ROWS, INT8_ROWS_OF_TWO)
FORMAT(Q4_0, CODE_ROWS, CODE_ROWS_OF_TWO)
FORMAT(Q4_1, CODE_ROWS, CODE_ROWS_OF_TWO)
FORMAT(Q4_K, CODE_ROWS, CODE_ROWS_OF_TWO)
FORMAT(Q5_K, CODE_ROWS, CODE_ROWS_OF_TWO)
FORMAT(Q6_K, CODE_ROWS, CODE_ROWS_OF_TWO)
FORMAT(MXFP4, CODE_ROWS, CODE_ROWS_OF_TWO)

typedef struct {
    void (*one_block)(const Tile *, int64_t rows), (*two_blocks)(const Tile *, int64_t rows);
    int64_t most_rows_of_two;
} Tiles;

#define ENTRY(format, most) [format] = {tiles_##format##_1, tiles_##format##_2, most}
static const Tiles TILES_OF[] = {
    ENTRY(F32, FLOAT_ROWS_OF_TWO), ENTRY(F16, FLOAT_ROWS_OF_TWO),
    ENTRY(BF16, FLOAT_ROWS_OF_TWO), ENTRY(Q8_0, INT8_ROWS_OF_TWO), ENTRY(Q4_0, CODE_ROWS_OF_TWO), ENTRY(Q4_1, CODE_ROWS_OF_TWO),
    ENTRY(Q4_K, CODE_ROWS_OF_TWO), ENTRY(Q5_K, CODE_ROWS_OF_TWO), ENTRY(Q6_K, CODE_ROWS_OF_TWO),
    ENTRY(MXFP4, CODE_ROWS_OF_TWO),
};

INLINE int64_t bytes_ahead(int64_t pair_bytes) { return pair_bytes < SHORT_PAIR_BYTES ? pair_bytes : PREFETCH_BYTES; }

// Fill the sums of `rows` rows and of one or two blocks.
static void multiply(Tile *tile, int64_t rows, int64_t blocks) {
    const LinearJob *job = tile->job;
    const int format = (int)job->format;
    const Tiles *tiles = &TILES_OF[format];
    if (rows <= tiles->most_rows_of_two) {  // weights are read once: two blocks, so that sums need not wait
        tile->begin = 0, tile->end = job->in_features;
        tile->ahead = bytes_ahead(2 * offset_of(format, job->in_features));
        (blocks == 2 ? tiles->two_blocks : tiles->one_block)(tile, rows);
        return;
    }
    const int64_t whole = is_k_quant(format) ? SUPER_GROUP : GROUP;
    const int64_t piece = PIECE_BYTES / offset_of(format, whole) * whole;
    for (int64_t b = 0; b < blocks; b++) {
        Tile one = {job, {tile->w[b], tile->w[b]}, tile->first_row, 0, 0, 0, {tile->sums[b], tile->sums[b]}};
        for (; one.begin < job->in_features; one.begin = one.end) {
            one.end = smaller(one.begin + piece, job->in_features);
            one.ahead = offset_of(format, one.end - one.begin);  // the next piece, or the next block
            tiles->one_block(&one, rows);
        }
    }
}

// What rows `first_row` and following have to do with blocks `block` and block + 1 (if it is there), in registers or (if
// `tile_rows` is there) in tiles.
static void run_pair(
    const LinearJob *job, int64_t block, int64_t blocks, int64_t first_row, int64_t rows, TileRows *tile_rows) {
    const int64_t bytes = block_bytes((int)job->format, job->in_features);
    const char *const first = (const char *)job->weights + block * bytes, *const w[2] = {first, first + (blocks - 1) * bytes};
#if HAS_AMX
    if (tile_rows) {
        amx_product(job, first_row, rows, w, block, blocks, bytes_ahead(2 * bytes), tile_rows);
        return;
    }
#endif
    (void)tile_rows;
    _Alignas(64) float sums[2][CHUNK_ROWS * BLOCK_COLS];
    Tile tile = {job, {w[0], w[1]}, first_row, 0, 0, 0, {sums[0], sums[1]}};
    for (int64_t b = 0; b < blocks; b++) memset(sums[b], 0, (size_t)(rows * BLOCK_COLS) * sizeof(float));
    multiply(&tile, rows, blocks);
    const Outputs outputs = {job, job->bias ? job->bias + block * BLOCK_COLS : NULL, first_row, block, blocks};
    for (int64_t row = 0; row < rows; row++) {
        const float *const of_row[2] = {sums[0] + row * BLOCK_COLS, sums[1] + row * BLOCK_COLS};
        finish_row(0, &outputs, of_row, vf_splat(1.0f), row);
    }
}

INLINE int64_t blocks_of(const LinearJob *job) {
    return num_blocks(job->out_features) * (job->mode == GATED ? 2 : 1);
}

int64_t num_pairs(const LinearJob *job) { return (blocks_of(job) + 1) / 2; }

void linear_in_registers(const LinearJob *job, int64_t first_row, int64_t rows, int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; pair++) {
        run_pair(job, 2 * pair, smaller(2, blocks_of(job) - 2 * pair), first_row, rows, NULL);
    }
}

typedef struct {
    int uses_tiles;
    int64_t begin, end;  // rows
    int64_t blocks, pairs, pairs_per_chunk, pair_chunks, row_chunks, rows_per_chunk;
} Cut;

// How the work of the rows of one kind is cut. It never changes a result: each number is one sum in one order.
static Cut cut_of(const LinearJob *job, const Step *step, int uses_tiles) {
    const int64_t rows = num_rows_of(step, (int)job->rows);
    const int64_t decodes = is_for_amx((int)job->format) ? num_decodes_of(step, (int)job->rows) : rows;
    Cut cut = {.uses_tiles = uses_tiles, .begin = uses_tiles ? decodes : 0, .end = uses_tiles ? rows : decodes};
    const int64_t count = cut.end - cut.begin;
    cut.blocks = blocks_of(job);
    cut.pairs = num_pairs(job);
    const int64_t bytes = 2 * block_bytes((int)job->format, job->in_features);
    int64_t most_rows = CHUNK_ROWS, whole = 1, rows_of_a_pass = 4, together = 1;
#if HAS_AMX
    if (uses_tiles) most_rows = amx_chunk_rows(job), rows_of_a_pass = whole = 2 * AMX_ROWS;
    if (uses_tiles && job->activations) together = GROUP / BLOCK_COLS;  // pairs that write the same lines
#endif
    cut.row_chunks = (count + most_rows - 1) / most_rows;
    cut.rows_per_chunk = cut.row_chunks ? (count + cut.row_chunks - 1) / cut.row_chunks : 0;
    cut.rows_per_chunk = (cut.rows_per_chunk + whole - 1) / whole * whole;
    const int64_t share = cut.pairs * bytes / MOST_CHUNKS, least = share > MIN_CHUNK_BYTES ? share : MIN_CHUNK_BYTES;
    const int64_t pairs = least / (bytes * (1 + smaller(cut.rows_per_chunk, count) / rows_of_a_pass));
    cut.pairs_per_chunk = pairs > together ? pairs / together * together : together;
    cut.pair_chunks = (cut.pairs + cut.pairs_per_chunk - 1) / cut.pairs_per_chunk;
    return cut;
}

INLINE int64_t chunks_of(const Cut *cut) { return cut->pair_chunks * cut->row_chunks; }

static int64_t num_chunks(const void *job, const Step *step) {
    const Cut tiles = cut_of(job, step, 1), others = cut_of(job, step, 0);
    return chunks_of(&tiles) + chunks_of(&others);
}

static void run_cut(const LinearJob *job, const Cut *cut, int64_t chunk) {
    // Row chunks of the same blocks follow each other, while the weights are in the cache. In tiles it is the blocks
    // that follow each other: a chunk has more bytes of activations.
    const int64_t row_chunk = cut->uses_tiles ? chunk / cut->pair_chunks : chunk % cut->row_chunks;
    const int64_t pair_chunk = cut->uses_tiles ? chunk % cut->pair_chunks : chunk / cut->row_chunks;
    const int64_t first_row = cut->begin + row_chunk * cut->rows_per_chunk, begin = pair_chunk * cut->pairs_per_chunk;
    const int64_t end = smaller(begin + cut->pairs_per_chunk, cut->pairs);
    TileRows tile_rows = {0};
    for (int64_t pair = begin; pair < end; pair++) {
        run_pair(job, 2 * pair, smaller(2, cut->blocks - 2 * pair), first_row,
                 smaller(cut->rows_per_chunk, cut->end - first_row), cut->uses_tiles ? &tile_rows : NULL);
    }
#if HAS_AMX
    if (cut->uses_tiles) tiles_release();
#endif
}

// The chunks of prompts come first: they are the longer ones.
static void run_chunk(const void *job, const Step *step, int64_t chunk) {
    const Cut tiles = cut_of(job, step, 1);
    if (chunk < chunks_of(&tiles)) {
        run_cut(job, &tiles, chunk);
        return;
    }
    const Cut others = cut_of(job, step, 0);
    run_cut(job, &others, chunk - chunks_of(&tiles));
}

const Kernel hw_linear = {.num_chunks = num_chunks, .run_chunk = run_chunk, .has_ordered_rows = HAS_AMX};
