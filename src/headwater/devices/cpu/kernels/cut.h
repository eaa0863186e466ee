// The least logit that top_k, top_p and min_p keep of a row. Of equal logits all are kept or none, as on a GPU.
//
// Nothing is sorted but the few logits around the edge: buckets of 1/64 nat below the largest logit count tokens and
// sum up their probabilities, and only the bucket where a cut falls is looked at in order. Sums run in an order that
// does not depend on WIDTH.

#pragma once

#include <stdlib.h>

#include "allowed.h"
#include "simd.h"

enum { BUCKETS_PER_NAT = 64, FEW_NATS = 8, MANY_NATS = 32, NUM_BUCKETS = BUCKETS_PER_NAT * MANY_NATS };
enum { MAX_EDGE = 4096, GROUP = 64, LANES = 16 };

typedef struct {
    const float *logits;
    const uint32_t *mask;  // of the tokens that are allowed; null: all
    int64_t cols;
    float temperature;
    float largest;      // of the scaled logits
    double total_mass;  // of all tokens; 0: not known yet
} ScaledRow;

typedef struct {
    int num_buckets;
    int32_t count[NUM_BUCKETS];
    double mass[NUM_BUCKETS];  // relative to the most probable token
} Buckets;

typedef struct {
    int64_t num;
    float logits[MAX_EDGE];  // scaled, the largest first
    float masses[MAX_EDGE];
} Edge;

// GROUP logits from `col` on by the row's temperature, -infinity behind the end and where the mask forbids a token.
// Returns the largest.
INLINE float scale_group(const ScaledRow *row, int64_t col, float *scaled) {
    uint64_t allowed = ~(uint64_t)0;
    if (row->mask) {
        allowed = allowed_within(row->mask, col, row->cols);
        allowed |= (uint64_t)allowed_within(row->mask, col + 32, row->cols) << 32;
        if (!allowed) {
            for (int i = 0; i < GROUP; i += WIDTH) vf_store(scaled + i, vf_splat(-INFINITY));
            return -INFINITY;
        }
    }
    const vf temperature = vf_splat(row->temperature);
    const int64_t left = row->cols - col;
    vf largest = vf_splat(-INFINITY);
    if (left < GROUP) {
        for (int i = 0; i < GROUP; i++) scaled[i] = i < left ? row->logits[col + i] : -INFINITY;
    }
    for (int i = 0; i < GROUP; i += WIDTH) {
        vf x = vf_load(left < GROUP ? scaled + i : row->logits + col + i) / temperature;
        if (row->mask) x = only_allowed(x, (uint32_t)(allowed >> i));
        vf_store(scaled + i, x);
        largest = vf_max(x, largest);  // NaN is passed over
    }
    return vf_max_of(largest);
}

// The bucket of a scaled logit; none (NUM_BUCKETS) for what is far below the largest, or NaN.
INLINE int bucket_of(const ScaledRow *row, float scaled) {
    const float at = (row->largest - scaled) * BUCKETS_PER_NAT;
    return at >= 0 && at < NUM_BUCKETS ? (int)at : NUM_BUCKETS;
}

static inline float largest_scaled(const ScaledRow *row) {
    float scaled[GROUP], largest = -INFINITY;
    for (int64_t col = 0; col < row->cols; col += GROUP) {
        const float found = scale_group(row, col, scaled);
        if (found > largest) largest = found;
    }
    return largest;
}

// The sum of the probabilities of all tokens, relative to the most probable one.
static inline double total_mass(ScaledRow *row) {
    if (row->total_mass > 0) return row->total_mass;
    float scaled[GROUP];
    vf sums[LANES / WIDTH];
    for (int i = 0; i < LANES / WIDTH; i++) sums[i] = vf_zero();
    double total = 0;
    for (int64_t col = 0; col < row->cols; col += GROUP) {
        scale_group(row, col, scaled);
        for (int i = 0; i < GROUP; i += WIDTH) {
            const vf x = vf_load(scaled + i);
            const vi is_token = (vi)(x > vf_splat(-INFINITY));  // vf_exp gives a little for -infinity
            sums[i / WIDTH % (LANES / WIDTH)] += (vf)((vi)vf_exp(x - vf_splat(row->largest)) & is_token);
        }
    }
    float lanes[LANES];
    for (int i = 0; i < LANES / WIDTH; i++) vf_store(lanes + i * WIDTH, sums[i]);
    for (int i = 0; i < LANES; i++) total += (double)lanes[i];
    return row->total_mass = total;
}

static inline void fill_buckets(const ScaledRow *row, int num_nats, Buckets *buckets) {
    buckets->num_buckets = num_nats * BUCKETS_PER_NAT;
    memset(buckets->count, 0, (size_t)buckets->num_buckets * sizeof *buckets->count);
    memset(buckets->mass, 0, (size_t)buckets->num_buckets * sizeof *buckets->mass);
    float scaled[GROUP], masses[GROUP];
    for (int64_t col = 0; col < row->cols; col += GROUP) {
        const float found = scale_group(row, col, scaled);
        if (bucket_of(row, found) >= buckets->num_buckets) continue;
        for (int i = 0; i < GROUP; i += WIDTH) {
            vf_store(masses + i, vf_exp(vf_load(scaled + i) - vf_splat(row->largest)));
        }
        for (int i = 0; i < GROUP; i++) {
            const int bucket = bucket_of(row, scaled[i]);
            if (bucket >= buckets->num_buckets) continue;
            buckets->count[bucket]++;
            buckets->mass[bucket] += (double)masses[i];
        }
    }
}

static int descending(const void *a, const void *b) {
    const float left = *(const float *)a, right = *(const float *)b;
    return (left < right) - (left > right);
}

// The logits of one bucket in order. 0 if they are too many.
static inline int find_edge(const ScaledRow *row, int bucket, Edge *edge) {
    float scaled[GROUP];
    edge->num = 0;
    for (int64_t col = 0; col < row->cols; col += GROUP) {
        if (bucket_of(row, scale_group(row, col, scaled)) > bucket) continue;
        for (int i = 0; i < GROUP; i++) {
            if (bucket_of(row, scaled[i]) != bucket) continue;
            if (edge->num == MAX_EDGE) return 0;
            edge->logits[edge->num++] = scaled[i];
        }
    }
    qsort(edge->logits, (size_t)edge->num, sizeof *edge->logits, descending);
    for (int64_t at = 0; at < edge->num; at += WIDTH) {
        const int64_t left = edge->num - at < WIDTH ? edge->num - at : WIDTH;
        vf_store_n(edge->masses + at, vf_exp(vf_load_n(edge->logits + at, left) - vf_splat(row->largest)), left);
    }
    return edge->num > 0;
}

// The least of the `top_k` largest, and the mass of all that are as large. 0 if it lies beyond the buckets.
static inline int cut_by_count(const ScaledRow *row, const Buckets *buckets, int64_t top_k, Edge *edge, float *least,
                               double *total) {
    int64_t before = 0;
    double mass = 0;
    int bucket = 0;
    for (; bucket < buckets->num_buckets && before + buckets->count[bucket] < top_k; bucket++) {
        before += buckets->count[bucket];
        mass += buckets->mass[bucket];
    }
    if (bucket == buckets->num_buckets || !find_edge(row, bucket, edge)) return 0;
    *least = edge->logits[top_k - before - 1];
    for (int64_t at = 0; at < edge->num && edge->logits[at] >= *least; at++) mass += (double)edge->masses[at];
    *total = mass;
    return 1;
}

// The least of the fewest largest whose mass is `wanted`. 0 if it lies beyond the buckets.
static inline int cut_by_mass(const ScaledRow *row, const Buckets *buckets, double wanted, Edge *edge, float *least) {
    double mass = 0;
    int bucket = 0;
    for (; bucket < buckets->num_buckets && mass + buckets->mass[bucket] < wanted; bucket++) {
        mass += buckets->mass[bucket];
    }
    if (bucket == buckets->num_buckets || !find_edge(row, bucket, edge)) return 0;
    int64_t at = 0;
    for (; at < edge->num - 1 && mass + (double)edge->masses[at] < wanted; at++) mass += (double)edge->masses[at];
    *least = edge->logits[at];
    return 1;
}

// The least scaled logit that top_k (0: all) and then top_p (1: all) keep, by buckets of `num_nats` below the largest.
// 0 if they do not reach that far.
static inline int cut_within(ScaledRow *row, int num_nats, int64_t top_k, float top_p, float *lowest) {
    Buckets buckets;
    Edge edge;
    fill_buckets(row, num_nats, &buckets);
    double total = 0;
    float least = -INFINITY;
    const int has_top_k = top_k > 0 && top_k < row->cols;
    if (has_top_k && !cut_by_count(row, &buckets, top_k, &edge, &least, &total)) return 0;
    if (top_p < 1.0f) {
        float by_mass;
        if (!has_top_k) total = total_mass(row);
        if (!cut_by_mass(row, &buckets, (double)top_p * total, &edge, &by_mass)) return 0;
        if (by_mass > least) least = by_mass;
    }
    *lowest = least;
    return 1;
}

INLINE int lowest_kept(ScaledRow *row, int64_t top_k, float top_p, float *lowest) {
    *lowest = -INFINITY;
    if ((top_k <= 0 || top_k >= row->cols) && top_p >= 1.0f) return 1;
    for (int num_nats = FEW_NATS; num_nats <= MANY_NATS; num_nats *= 2) {
        if (cut_within(row, num_nats, top_k, top_p, lowest)) return 1;
    }
    return 0;
}
