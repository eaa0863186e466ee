// The next token of each row of logits: the largest, or a draw with the Gumbel-max trick. The noise is that of
// devices/noise.py, computed as it is used. A row may have a mask of the tokens that it may choose from (allowed.h). All arithmetic here is exact or rounded once, in an order that does not
// depend on WIDTH: every instruction set chooses the same tokens.

#include "allowed.h"
#include "cut.h"
#include "simd.h"
#include "step.h"

// The largest value so far of each lane, and the first column where it was.
typedef struct {
    vf value;
    vi column;
} Best;

INLINE Best no_best(void) { return (Best){vf_splat(-INFINITY), lane_numbers()}; }

INLINE Best better(Best best, vf value, vi columns) {
    const vi wins = (vi)(value > best.value);
    return (Best){select_floats(wins, value, best.value), select_lanes(wins, columns, best.column)};
}

INLINE int32_t first_best(Best best) {
    int lane = 0;
    for (int i = 1; i < WIDTH; i++) {
        const int wins = best.value[i] > best.value[lane];
        const int ties = best.value[i] == best.value[lane] && best.column[i] < best.column[lane];
        if (wins || ties) lane = i;
    }
    return best.column[lane];
}

typedef struct {
    const float *logits;  // [rows][cols]
    int32_t *tokens;      // [rows]
    uint8_t *is_finite;   // [rows]
    float *values;        // [rows] the largest; or NULL
    int64_t cols;
    int64_t num_rows;  // -1: the step's selected rows
} ArgmaxJob;

static int64_t argmax_chunks(const void *opaque, const Step *step) {
    const ArgmaxJob *job = opaque;
    return job->num_rows < 0 ? step->num_selected : job->num_rows;
}

static void argmax_chunk(const void *opaque, const Step *step, int64_t row) {
    (void)step;
    const ArgmaxJob *job = opaque;
    const float *logits = job->logits + row * job->cols;
    Best best = no_best(), other = no_best();
    vf differences = vf_zero(), others = vf_zero();  // x - x is 0, or NaN if x is not finite
    vi columns = lane_numbers();
    int64_t col = 0;
    for (; col + 2 * WIDTH <= job->cols; col += 2 * WIDTH) {
        const vf first = vf_load(logits + col), second = vf_load(logits + col + WIDTH);
        best = better(best, first, columns);
        other = better(other, second, columns + vi_splat(WIDTH));
        differences = differences + (first - first);
        others = others + (second - second);
        columns = columns + vi_splat(2 * WIDTH);
    }
    int32_t token = first_best(best);
    const int32_t second_token = first_best(other);
    if (col && (logits[second_token] > logits[token] ||
                (logits[second_token] == logits[token] && second_token < token))) {
        token = second_token;
    }
    float rest = 0;
    for (; col < job->cols; col++) {
        rest += logits[col] - logits[col];
        if (logits[col] > logits[token]) token = (int32_t)col;
    }
    job->tokens[row] = token;
    if (job->values) job->values[row] = logits[token];
    job->is_finite[row] = vf_sum(differences + others) + rest == 0;
}

const Kernel hw_argmax = {.num_chunks = argmax_chunks, .run_chunk = argmax_chunk};

typedef struct {
    const float *logits;       // [any][cols]
    const int32_t *rows;       // [num_rows] rows of `logits`
    const uint32_t *masks;     // [any][num_words]
    const int32_t *mask_rows;  // [num_rows] rows of `masks`
    int32_t *tokens;           // [num_rows]
    int64_t cols, num_rows, num_words;
} MaskedArgmaxJob;

static int64_t masked_argmax_chunks(const void *job, const Step *step) {
    (void)step;
    return ((const MaskedArgmaxJob *)job)->num_rows;
}

// The first of the largest allowed logits; the first allowed token if all of them are -infinity or NaN.
static void masked_argmax_chunk(const void *opaque, const Step *step, int64_t number) {
    (void)step;
    const MaskedArgmaxJob *job = opaque;
    const float *logits = job->logits + job->rows[number] * job->cols;
    const uint32_t *mask = job->masks + job->mask_rows[number] * job->num_words;
    Best best = no_best();
    for (int64_t col = 0; col < job->cols; col += 32) {
        const uint32_t allowed = allowed_within(mask, col, job->cols);
        if (!allowed) continue;  // most words of most masks
        const int64_t left = job->cols - col;
        for (int i = 0; i < 32 && i < left; i += WIDTH) {
            const vf value = left - i < WIDTH ? vf_load_n(logits + col + i, left - i) : vf_load(logits + col + i);
            best = better(best, only_allowed(value, allowed >> i), lane_numbers() + vi_splat((int32_t)col + i));
        }
    }
    const int has_best = vf_max_of(best.value) > -INFINITY;
    job->tokens[number] = has_best ? first_best(best) : first_allowed(mask, job->cols);
}

const Kernel hw_masked_argmax = {.num_chunks = masked_argmax_chunks, .run_chunk = masked_argmax_chunk};

INLINE vu mix32(vu x) {  // Wellons' lowbias32
    x = x ^ (x >> 16);
    x = x * 0x7feb352du;
    x = x ^ (x >> 15);
    x = x * 0x846ca68bu;
    return x ^ (x >> 16);
}

// log(x) for positive x: the exponent, and the series of atanh for a mantissa in [0.75, 1.5).
INLINE vf vf_log(vf x) {
    const vf one = vf_splat(1.0f);
    const vi exponent = ((vi)x - vi_splat(0x3f400000)) >> 23;
    const vf m = (vf)((vu)x - ((vu)exponent << 23));
    const vf s = (m - one) / (m + one), s2 = s * s;
    vf series = vf_splat(2.0f / 9);
    series = vf_fma(series, s2, vf_splat(2.0f / 7));
    series = vf_fma(series, s2, vf_splat(2.0f / 5));
    series = vf_fma(series, s2, vf_splat(2.0f / 3));
    series = vf_fma(series, s2, vf_splat(2.0f));
    return vf_fma(vf_from_int(exponent), vf_splat(0.693147181f), series * s);
}

// -log(1 - u): the logarithm where it is exact enough, a series where 1 - u would lose u's digits.
INLINE vf exponential(vf u) {
    const vf one = vf_splat(1.0f);
    vf series = vf_splat(1.0f / 5);
    series = vf_fma(series, u, vf_splat(1.0f / 4));
    series = vf_fma(series, u, vf_splat(1.0f / 3));
    series = vf_fma(series, u, vf_splat(1.0f / 2));
    series = vf_fma(series, u, one);
    return select_floats((vi)(u < vf_splat(0.03f)), series * u, vf_zero() - vf_log(one - u));
}

// Uniform noise in (0, 1).
INLINE vf uniform(vi tokens, uint64_t key) {
    const vu low = (vu)vi_splat((int32_t)(uint32_t)key), high = (vu)vi_splat((int32_t)(uint32_t)(key >> 32));
    const vi bits = (vi)(mix32(mix32((vu)tokens ^ low) + high) & 0x7fffffffu);
    const vf u = vf_fma(vf_from_int(bits), vf_splat(0x1p-31f), vf_splat(0x1p-32f));
    return vf_min(u, vf_splat(1.0f - 0x1p-24f));
}

// Whether a token of a group may score more than `best`, that is, whether E < exp(logit - best) for its exponential
// noise E. E is at least u, so no logarithm is needed to rule out nearly all groups.
INLINE int may_win(const float *scaled, int64_t col, uint64_t key, float best) {
    vf largest = vf_splat(-1.0f);
    for (int i = 0; i < GROUP; i += WIDTH) {
        const vf u = uniform(lane_numbers() + vi_splat((int32_t)col + i), key);
        const vf limit = vf_exp(vf_load(scaled + i) - vf_splat(best)) * vf_splat(1.001f);
        largest = vf_max(limit - u, largest);
    }
    return vf_max_of(largest) >= 0;
}

typedef struct {
    const float *logits;        // [any][cols]
    const int32_t *rows;        // [num_rows] rows of `logits`
    const uint64_t *keys;       // [num_rows]
    const float *temperatures;  // [num_rows]
    const float *log_min_p;     // [num_rows]; tokens less probable than e^this times the best one are out
    int32_t *tokens;            // [num_rows]; -1: the cut falls among so many tokens that it is not made here
    int64_t cols;
    int64_t num_rows;
    const int32_t *top_k;  // [num_rows], or null: none; 0: all
    const float *top_p;    // [num_rows], or null: none; 1: all
    const uint32_t *masks;     // [any][num_words], or null: all tokens are allowed
    const int32_t *mask_rows;  // [num_rows] rows of `masks`; -1: all tokens are allowed
    int64_t num_words;
} DrawJob;

static int64_t draw_chunks(const void *job, const Step *step) {
    (void)step;
    return ((const DrawJob *)job)->num_rows;
}

// top_k comes first; top_p then keeps the fewest tokens whose probabilities, renormalised after top_k, sum to it.
static void draw_chunk(const void *opaque, const Step *step, int64_t number) {
    (void)step;
    const DrawJob *job = opaque;
    const int64_t mask_row = job->masks ? job->mask_rows[number] : -1;
    ScaledRow row = {.logits = job->logits + job->rows[number] * job->cols,
                     .mask = mask_row < 0 ? NULL : job->masks + mask_row * job->num_words,
                     .cols = job->cols,
                     .temperature = job->temperatures[number]};
    const int64_t top_k = job->top_k ? job->top_k[number] : 0;
    const float top_p = job->top_p ? job->top_p[number] : 1.0f, log_min_p = job->log_min_p[number];
    float lowest = -INFINITY;
    if (top_k > 0 || top_p < 1.0f || log_min_p > -INFINITY) {
        row.largest = largest_scaled(&row);
        if (!lowest_kept(&row, top_k, top_p, &lowest)) {
            job->tokens[number] = -1;
            return;
        }
        if (row.largest + log_min_p > lowest) lowest = row.largest + log_min_p;
    }
    Best best = no_best();
    float scaled[GROUP], best_score = -INFINITY;
    for (int64_t col = 0; col < job->cols; col += GROUP) {
        if (scale_group(&row, col, scaled) < lowest || !may_win(scaled, col, job->keys[number], best_score)) continue;
        for (int i = 0; i < GROUP; i += WIDTH) {
            const vf logit = vf_load(scaled + i);
            const vi columns = lane_numbers() + vi_splat((int32_t)col + i);
            const vf score = logit - vf_log(exponential(uniform(columns, job->keys[number])));
            best = better(best, select_floats((vi)(logit < vf_splat(lowest)), vf_splat(-INFINITY), score), columns);
        }
        best_score = vf_max_of(best.value);
    }
    const int has_best = !row.mask || vf_max_of(best.value) > -INFINITY;
    job->tokens[number] = has_best ? first_best(best) : first_allowed(row.mask, job->cols);
}

const Kernel hw_draw = {.num_chunks = draw_chunks, .run_chunk = draw_chunk};
