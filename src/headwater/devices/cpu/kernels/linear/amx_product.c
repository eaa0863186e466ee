// A panel is one or two blocks and some groups of inputs as tiles of weights, so few that they stay in the first cache.
// The first rows of a chunk fill it while they multiply, so that both kinds of work overlap; all other rows find it
// there. Weights in bfloat16 lie in memory as tiles, and only what is left of a group is copied. Two tiles of rows by
// two blocks share what they load. Tiles of rows have exactly the rows that there are.
//
// Rows are finished beside the products of those that follow. What they will be written to is fetched one pass before:
// outputs are larger than the second cache, and a store that misses it stops the stores behind it.

#include "amx_product.h"

#if HAS_AMX

#include "amx_weights.h"
#include "outputs.h"

enum {
    PIECE = 18,  // groups of a panel at most
    LAG = 2,     // groups between a tile's stores and its load, which would wait for them
    PASS = 2 * AMX_ROWS,
    TILE_BYTES = AMX_ROWS * AMX_BYTES,
};

typedef void (*Fill)(const char *super, const char *group, char *tile);

static void fill_Q8_0(const char *super, const char *group, char *tile) { (void)super, fill_from_bytes(group, tile); }

#define FILL(format)                                                                     \
    static void fill_##format(const char *super, const char *group, char *tile) {        \
        fill_from_quads(format, super, group, tile);                                     \
    }
FILL(Q4_0) FILL(Q4_1) FILL(Q4_K) FILL(Q5_K) FILL(Q6_K) FILL(MXFP4)

static const Fill FILLS[] = {
    [Q8_0] = fill_Q8_0, [Q4_0] = fill_Q4_0, [Q4_1] = fill_Q4_1,
    [Q4_K] = fill_Q4_K, [Q5_K] = fill_Q5_K, [Q6_K] = fill_Q6_K,
    [MXFP4] = fill_MXFP4,
};

typedef struct {
    const Outputs *outputs;
    int format;
    const char *x;  // groups of the first row
    int64_t x_stride, x_bytes;  // from row to row, of a group
    const char *w[2];  // the packed groups of the piece
    char *panels[2];
    int64_t blocks, groups, ahead;
    int64_t whole, rest;  // BF16: groups whose weights are in place, and inputs of the one behind them
    int is_first, is_last;  // piece of the inputs
    const char *next[2];  // weights that come next
    float *sums[2];  // of row r at r & kept: of all rows between pieces, else of two passes
    int64_t kept;
} Piece;

// Tiles 0 to 3: sums (two of rows by two blocks). 4, 5: activations. 6, 7: weights.
static void configure(int64_t first, int64_t second, TileRows *now) {
    if (now->first == first && now->second == second) return;
    TileConfig config = {.palette = 1};
    for (int tile = 0; tile < NUM_TILES; tile++) {
        const int is_second = tile == 2 || tile == 3 || tile == 5;
        config.rows[tile] = tile >= 6 ? AMX_ROWS : is_second ? second : first;
        config.row_bytes[tile] = config.rows[tile] ? AMX_BYTES : 0;
    }
    tiles_configure(&config);
    *now = (TileRows){first, second};
}

INLINE void fill_group(const Piece *p, int64_t g) {
    const int is_k = is_k_quant(p->format), together = SUPER_GROUP / GROUP;
    const int64_t bytes = group_bytes(p->format), shared = is_k ? super_bytes(p->format) : 0;
    const int64_t super_at = is_k ? g / together * (shared + together * bytes) : 0;
    const int64_t at = is_k ? super_at + shared + g % together * bytes : g * bytes;
    for (int64_t b = 0; b < p->blocks; b++) {
        prefetch(p->w[b] + at + p->ahead, bytes);
        char *tile = p->panels[b] + g * TILE_BYTES;
        if (p->format != BF16) {
            FILLS[p->format](p->w[b] + super_at, p->w[b] + at, tile);
        } else if (g >= p->whole) {
            memset(tile, 0, TILE_BYTES);
            memcpy(tile, p->w[b] + at, (size_t)p->rest * BLOCK_COLS * sizeof(bf16));
        }
    }
}

INLINE const char *weights_of(const Piece *p, int64_t b, int64_t g) {
    return (p->format == BF16 && g < p->whole ? p->w[b] : p->panels[b]) + g * TILE_BYTES;
}

// Add the products of group `g` to the sums in tiles 0 to 3.
INLINE void add_group_of(const Piece *p, const char *x, int64_t tiles, int64_t g) {
    tile_load(6, weights_of(p, 0, g), AMX_BYTES);
    if (p->blocks == 2) tile_load(7, weights_of(p, 1, g), AMX_BYTES);
    for (int64_t part = 0; part < p->x_bytes; part += AMX_BYTES) {  // two for BF16 and Q8_0
        const char *from = x + g * p->x_bytes + part;
        tile_load_once(4, from, p->x_stride);
        tile_dot_bf16(0, 4, 6);
        if (p->blocks == 2) tile_dot_bf16(1, 4, 7);
        if (tiles == 1) continue;
        tile_load_once(5, from + AMX_ROWS * p->x_stride, p->x_stride);
        tile_dot_bf16(2, 5, 6);
        if (p->blocks == 2) tile_dot_bf16(3, 5, 7);
    }
}

INLINE float *sums_of(const Piece *p, int64_t b, int64_t row) { return p->sums[b] + (row & p->kept) * BLOCK_COLS; }

static void start_sums(const Piece *p, int64_t row, int64_t tiles) {
    if (p->is_first) {
        tile_zero(0);
        tile_zero(1);
        if (tiles == 2) {
            tile_zero(2);
            tile_zero(3);
        }
        return;
    }
    tile_load(0, sums_of(p, 0, row), AMX_BYTES);
    if (p->blocks == 2) tile_load(1, sums_of(p, 1, row), AMX_BYTES);
    if (tiles == 1) return;
    tile_load(2, sums_of(p, 0, row + AMX_ROWS), AMX_BYTES);
    if (p->blocks == 2) tile_load(3, sums_of(p, 1, row + AMX_ROWS), AMX_BYTES);
}

static void store_sums(const Piece *p, int64_t row, int64_t tiles) {
    tile_store(0, sums_of(p, 0, row), AMX_BYTES);
    if (p->blocks == 2) tile_store(1, sums_of(p, 1, row), AMX_BYTES);
    if (tiles == 1) return;
    tile_store(2, sums_of(p, 0, row + AMX_ROWS), AMX_BYTES);
    if (p->blocks == 2) tile_store(3, sums_of(p, 1, row + AMX_ROWS), AMX_BYTES);
}

INLINE void finish_rows(const Piece *p, int64_t begin, int64_t end) {
    const vf unit = vf_splat(amx_unit(p->format));
    for (int64_t row = begin; row < end; row++) {
        const float *const sums[2] = {sums_of(p, 0, row), sums_of(p, 1, row)};
        finish_row(1, p->outputs, sums, unit, row);
    }
}

// One or two tiles of rows. The first ones fill the panel, the second ones fetch the weights that come next.
static void multiply_rows(const Piece *p, int64_t row, int64_t rows, int64_t tiles) {
    const char *x = p->x + row * p->x_stride;
    const int64_t fetched = row == PASS ? block_bytes(p->format, p->groups * GROUP) / p->groups : 0;
    const int64_t lag = row == 0 ? LAG : 0, before = row - PASS;  // rows of the pass before
    start_sums(p, row, tiles);
    for (int64_t g = -lag, done = 0; g < p->groups; g++) {
        if (lag && g + lag < p->groups) fill_group(p, g + lag);
        if (g < 0) continue;
        for (int64_t b = 0; fetched && b < p->blocks; b++) prefetch(p->next[b] + g * fetched, fetched);
        add_group_of(p, x, tiles, g);
        if (!p->is_last) continue;
        const int64_t until = PASS * (g + 1) / p->groups;
        fetch_outputs(p->outputs, row + done, row + until < rows ? row + until : rows);
        if (row) finish_rows(p, before + done, before + until);
        done = until;
    }
    store_sums(p, row, tiles);
}

static void multiply_piece(const Piece *p, int64_t rows, TileRows *tile_rows) {
    int64_t row = 0;
    for (; row < rows; row += PASS) {
        const int64_t left = rows - row, first = left < AMX_ROWS ? left : AMX_ROWS, rest = left - first;
        configure(first, rest < AMX_ROWS ? rest : AMX_ROWS, tile_rows);
        multiply_rows(p, row, rows, rest ? 2 : 1);
    }
    if (p->is_last) finish_rows(p, row - PASS, rows);
}

void amx_product(
    const LinearJob *job, int64_t first_row, int64_t rows, const char *const w[2], int64_t block, int64_t blocks,
    int64_t ahead, TileRows *tile_rows) {
    _Alignas(64) char panels[2][PIECE * TILE_BYTES];
    _Alignas(64) float sums[2][AMX_CHUNK_ROWS * BLOCK_COLS];
    const int format = (int)job->format;
    const Outputs outputs = {job, job->bias ? job->bias + block * BLOCK_COLS : NULL, first_row, block, blocks};
    const int64_t groups = (job->in_features + GROUP - 1) / GROUP, stride = activation_bytes(format, job->in_features);
    const int64_t whole = is_k_quant(format) ? SUPER_GROUP / GROUP : 1, most = PIECE / whole * whole;
    const int64_t pieces = (groups + most - 1) / most;  // of about equal size
    const int64_t share = ((groups + pieces - 1) / pieces + whole - 1) / whole * whole;
    for (int64_t begin = 0, count; begin < groups; begin += count) {
        count = groups - begin < share ? groups - begin : share;
        const int64_t offset = block_bytes(format, begin * GROUP), is_last = begin + count == groups;
        const int64_t to_next = is_last ? blocks * block_bytes(format, job->in_features) - offset
                                        : block_bytes(format, count * GROUP);
        const Piece piece = {
            .outputs = &outputs,
            .format = format,
            .x = (const char *)job->x + first_row * stride + activation_bytes(format, begin * GROUP),
            .x_stride = stride,
            .x_bytes = activation_bytes(format, GROUP),
            .w = {w[0] + offset, w[1] + offset},
            .panels = {panels[0], panels[1]},
            .blocks = blocks,
            .groups = count,
            .ahead = ahead,
            .whole = job->in_features / GROUP - begin,
            .rest = job->in_features % GROUP,
            .is_first = begin == 0,
            .is_last = (int)is_last,
            .next = {w[0] + offset + to_next, w[1] + offset + to_next},
            .sums = {sums[0], sums[1]},
            .kept = pieces == 1 ? 2 * PASS - 1 : -1,
        };
        multiply_piece(&piece, rows, tile_rows);
    }
}

#endif
