// Sample rows of logits with the Gumbel-max trick. The noise is that of devices/noise.py, computed as it is used.

#include <math.h>

#include "pool.h"
#include "tile.h"

static inline __m512i mix32(__m512i x) {  // Wellons' lowbias32
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
    x = _mm512_mullo_epi32(x, _mm512_set1_epi32(0x7feb352d));
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 15));
    x = _mm512_mullo_epi32(x, _mm512_set1_epi32((int)0x846ca68bu));
    return _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
}

// log(x) for positive x: the exponent, and the series of atanh for a mantissa in [0.75, 1.5).
static inline __m512 log512(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
    const __mmask16 is_below_one = _mm512_cmp_ps_mask(m, one, _CMP_LT_OQ);
    const __m512 exponent = _mm512_getexp_ps(x);
    const __m512 n = _mm512_mask_add_ps(exponent, is_below_one, exponent, one);
    const __m512 s = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one)), s2 = _mm512_mul_ps(s, s);
    __m512 series = _mm512_set1_ps(2.0f / 9);
    series = _mm512_fmadd_ps(series, s2, _mm512_set1_ps(2.0f / 7));
    series = _mm512_fmadd_ps(series, s2, _mm512_set1_ps(2.0f / 5));
    series = _mm512_fmadd_ps(series, s2, _mm512_set1_ps(2.0f / 3));
    series = _mm512_fmadd_ps(series, s2, _mm512_set1_ps(2.0f));
    return _mm512_fmadd_ps(n, _mm512_set1_ps(0.693147181f), _mm512_mul_ps(series, s));
}

// -log(1 - u): the logarithm where it is exact enough, a series where 1 - u would lose u's digits.
static inline __m512 exponential(__m512 u) {
    const __m512 one = _mm512_set1_ps(1.0f);
    __m512 series = _mm512_set1_ps(1.0f / 5);
    series = _mm512_fmadd_ps(series, u, _mm512_set1_ps(1.0f / 4));
    series = _mm512_fmadd_ps(series, u, _mm512_set1_ps(1.0f / 3));
    series = _mm512_fmadd_ps(series, u, _mm512_set1_ps(1.0f / 2));
    series = _mm512_fmadd_ps(series, u, one);
    const __mmask16 is_small = _mm512_cmp_ps_mask(u, _mm512_set1_ps(0.03f), _CMP_LT_OQ);
    const __m512 value = _mm512_sub_ps(_mm512_setzero_ps(), log512(_mm512_sub_ps(one, u)));
    return _mm512_mask_mul_ps(value, is_small, series, u);
}

typedef struct {
    const float *logits;
    const uint64_t *keys;
    int64_t *winners;
    long cols;
} Draw;

static void draw_row(void *opaque, long row) {
    const Draw *job = opaque;
    const float *logits = job->logits + row * job->cols;
    const __m512i low = _mm512_set1_epi32((int)job->keys[row]), high = _mm512_set1_epi32((int)(job->keys[row] >> 32));
    const __m512 smallest = _mm512_set1_ps(0x1p-32f), largest = _mm512_set1_ps(1.0f - 0x1p-24f);
    __m512 best = _mm512_set1_ps(-INFINITY);
    __m512i best_at = _mm512_setzero_si512(), at = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (long col = 0; col < job->cols; col += 16) {
        const __mmask16 mask = job->cols - col >= 16 ? 0xffff : (__mmask16)((1u << (job->cols - col)) - 1);
        __m512i bits = mix32(_mm512_add_epi32(mix32(_mm512_xor_si512(at, low)), high));
        bits = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
        __m512 u = _mm512_fmadd_ps(_mm512_cvtepi32_ps(bits), _mm512_set1_ps(0x1p-31f), smallest);
        u = _mm512_min_ps(u, largest);
        const __m512 logit = _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), mask, logits + col);
        const __m512 score = _mm512_sub_ps(logit, log512(exponential(u)));
        const __mmask16 wins = _mm512_cmp_ps_mask(score, best, _CMP_GT_OQ);
        best = _mm512_mask_mov_ps(best, wins, score);
        best_at = _mm512_mask_mov_epi32(best_at, wins, at);
        at = _mm512_add_epi32(at, _mm512_set1_epi32(16));
    }
    const float top = _mm512_reduce_max_ps(best);
    const __mmask16 is_top = _mm512_cmp_ps_mask(best, _mm512_set1_ps(top), _CMP_EQ_OQ);
    job->winners[row] = is_top ? _mm512_mask_reduce_min_epi32(is_top, best_at) : 0;
}

// winners[row] = argmax of logits[row][i] - log(E(keys[row], i)), E exponential: a draw from softmax(logits[row]).
void hw_draw(const float *logits, const uint64_t *keys, int64_t *winners, long rows, long cols, int threads) {
    Draw job = {.logits = logits, .keys = keys, .winners = winners, .cols = cols};
    pool_run(draw_row, &job, rows, threads);
}
