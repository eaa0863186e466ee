// Linear layers on packed bfloat16 weights, with what follows them done while the sums are in the cache.

#include "pool.h"
#include "tile.h"

enum { STORE_BF16 = 0, STORE_F32 = 1, ADD_F32 = 2, GATED_BF16 = 3 };

static inline void store_row(int mode, const float *sums, void *y, long row, long stride, long col, long cols) {
    if (mode == GATED_BF16) {  // 16 columns of the gate beside their 16 of the other half
        const __m512 gate = _mm512_load_ps(sums), up = _mm512_load_ps(sums + 16);
        const __m512 one = _mm512_set1_ps(1.0f), sign = _mm512_set1_ps(-0.0f);
        // exp of minus the absolute value only, so that it cannot overflow
        const __m512 e = exp512(_mm512_or_ps(gate, sign));
        const __mmask16 is_negative = _mm512_cmp_ps_mask(gate, _mm512_setzero_ps(), _CMP_LT_OQ);
        const __m512 sigmoid = _mm512_div_ps(_mm512_mask_blend_ps(is_negative, one, e), _mm512_add_ps(one, e));
        const __m512 value = _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid), up);
        const __mmask16 mask = cols >= 32 ? 0xffff : (__mmask16)((1u << (cols / 2)) - 1);
        _mm256_mask_storeu_epi16((bf16 *)y + row * stride + col / 2, mask, narrow(value));
        return;
    }
    for (int half = 0; half < TILE_COLS && half < cols; half += 16) {
        const __mmask16 mask = cols - half >= 16 ? 0xffff : (__mmask16)((1u << (cols - half)) - 1);
        const __m512 value = _mm512_load_ps(sums + half);
        const long at = row * stride + col + half;
        if (mode == STORE_BF16) {
            _mm256_mask_storeu_epi16((bf16 *)y + at, mask, narrow(value));
        } else if (mode == STORE_F32) {
            _mm512_mask_storeu_ps((float *)y + at, mask, value);
        } else {
            const __m512 before = _mm512_maskz_loadu_ps(mask, (float *)y + at);
            _mm512_mask_storeu_ps((float *)y + at, mask, _mm512_add_ps(before, value));
        }
    }
}

typedef struct {
    const bf16 *x, *w;
    const float *bias;
    void *y;
    long rows, in, out, blocks_per_chunk;
    int mode;
} Linear;

static void run_block(const Linear *job, long block, int tile_rows) {
    _Alignas(64) float sums[TILE_ROWS * TILE_COLS];
    const long col = block * TILE_COLS;
    const long stride = job->mode == GATED_BF16 ? job->out / 2 : job->out;
    const bf16 *packed = job->w + block * job->in * TILE_COLS;
    for (long row = 0; row < job->rows; row += tile_rows) {
        const int num = job->rows - row < tile_rows ? (int)(job->rows - row) : tile_rows;
        for (int i = 0; i < num; i++) {
            if (job->bias) memcpy(sums + i * TILE_COLS, job->bias + col, TILE_COLS * sizeof(float));
            else memset(sums + i * TILE_COLS, 0, TILE_COLS * sizeof(float));
        }
        multiply_tile(num, job->x + row * job->in, job->in, packed, job->in, sums);
        for (int i = 0; i < num; i++) {
            store_row(job->mode, sums + i * TILE_COLS, job->y, row + i, stride, col, job->out - col);
        }
    }
}

static long num_blocks(const Linear *job) { return (job->out + TILE_COLS - 1) / TILE_COLS; }

static void run_chunk(void *opaque, long chunk) {
    const Linear *job = opaque;
    const long end = (chunk + 1) * job->blocks_per_chunk, blocks = num_blocks(job);
    const int tile_rows = tile_rows_for(job->rows);
    for (long block = chunk * job->blocks_per_chunk; block < end && block < blocks; block++) {
        run_block(job, block, tile_rows);
    }
}

// y = x w^T + bias, stored by `mode`. x: bf16[rows][in]; w: ceil(out / TILE_COLS) packed blocks;
// bias: float[out rounded up to TILE_COLS] or NULL; y: rows of `out` values (out / 2 when gated).
void hw_linear(const bf16 *x, long rows, long in, const bf16 *w, const float *bias, long out, int mode, void *y,
               int threads) {
    Linear job = {.x = x, .w = w, .bias = bias, .y = y, .rows = rows, .in = in, .out = out, .mode = mode};
    const long blocks = num_blocks(&job), most_chunks = 16L * threads;
    job.blocks_per_chunk = (blocks + most_chunks - 1) / most_chunks;
    pool_run(run_chunk, &job, (blocks + job.blocks_per_chunk - 1) / job.blocks_per_chunk, threads);
}
