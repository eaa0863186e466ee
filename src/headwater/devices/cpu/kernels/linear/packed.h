// Packed weights: how a matrix [out][in] lies in memory, and the activations that its products take.
//
// The outputs are cut into blocks of BLOCK_COLS (the last one filled up with zeros). A block holds all inputs of its
// outputs, one after another, so a product reads one stream and adds down the columns, never across a vector.
// Formats whose numbers share scales store each group of inputs whole:
//
//   float32, float16  [in][16]
//   bfloat16          [in / 2][16][2]
//   Q8_0              [in / 32] { int8 [16][16][2], float16 scale[16] }
//   Q4_0, Q4_1        [in / 32] { codes, float16 scale[16], Q4_1: float16 min[16] }
//   Q4_K, Q5_K        [in / 256] { float16 scale[16], float16 min[16],
//                                  [8] { codes, Q5_K: high bits, uint8 scale[16], uint8 min[16] } }
//   Q6_K              [in / 256] { float16 scale[16], [8] { codes, high bits, int8 scale[2][16] } }
//   MXFP4             [in / 32] { codes, uint8 exponent[16] }; a code is one of 16 numbers of 4 bits (E2M1)
//
// `codes` of a group are 4 vectors of [16][4] bytes. The low nibbles of vector j are inputs 8j to 8j + 3, the high
// nibbles 8j + 4 to 8j + 7. Four inputs of all outputs are a quad: 2j and 2j + 1 here. High bits: byte i of Q5_K's
// 64 has the fifth bit of quad q at bit q; byte i of Q6_K's first 64 has those of quads 0 to 3, two bits each, and of
// its second 64 those of quads 4 to 7.
//
// The values are the file's: scales and codes are moved, never rounded.

#pragma once

#include "simd_amx.h"

// Compute `x` here. clang would begin with later sums of a tile first, and spill them: a seventh of the time on AVX2.
#if defined(__clang__) && WIDTH == 8
#define keep_here(x) __asm__ volatile("" : "+x"(x))
#else
#define keep_here(x) ((void)0)
#endif

enum { BLOCK_COLS = 16, GROUP = 32, SUPER_GROUP = 256, VECTORS = BLOCK_COLS / WIDTH };

enum Format { F32 = 0, BF16 = 1, F16 = 2, Q8_0 = 3, Q4_0 = 4, Q4_1 = 5, Q4_K = 6, Q5_K = 7, Q6_K = 8, MXFP4 = 9 };

enum { CODE_BYTES = GROUP * BLOCK_COLS / 2 };

// Activations of Q8_0 products: int16 times a scale of the group; their error is below 2e-5 of the largest.
typedef struct {
    int16_t values[GROUP];
    float scale;
} Group16;

// Activations of products with 4 to 6 bits: int8 times a scale of the group. `sums`: of the values of each half.
typedef struct {
    int8_t values[GROUP];
    float scale, scaled_sum;  // scaled_sum = scale * (sums[0] + sums[1])
    int16_t sums[2];
} Group8;

INLINE int is_k_quant(const int format) { return format >= Q4_K && format <= Q6_K; }

// Bytes of one group of 32 inputs, without what a super group shares.
INLINE int64_t group_bytes(const int format) {
    switch (format) {
        case F32: return GROUP * BLOCK_COLS * 4;
        case BF16: case F16: return GROUP * BLOCK_COLS * 2;
        case Q8_0: return GROUP * BLOCK_COLS + 2 * BLOCK_COLS;
        case Q4_0: return CODE_BYTES + 2 * BLOCK_COLS;
        case Q4_1: return CODE_BYTES + 4 * BLOCK_COLS;
        case Q4_K: return CODE_BYTES + 2 * BLOCK_COLS;
        case Q5_K: return CODE_BYTES + 64 + 2 * BLOCK_COLS;
        case MXFP4: return CODE_BYTES + BLOCK_COLS;
        default: return CODE_BYTES + 128 + 2 * BLOCK_COLS;
    }
}

INLINE int64_t super_bytes(const int format) { return format == Q6_K ? 2 * BLOCK_COLS : 4 * BLOCK_COLS; }

// Bytes of a block of 16 outputs.
INLINE int64_t block_bytes(const int format, int64_t in_features) {
    if (format <= F16) return in_features * BLOCK_COLS * (format == F32 ? 4 : 2);
    const int64_t groups = in_features / GROUP * group_bytes(format);
    return is_k_quant(format) ? groups + in_features / SUPER_GROUP * super_bytes(format) : groups;
}

// Twice the number that each code of MXFP4 stands for, plus FP4_ZERO: so that it is no sign, and small.
enum { FP4_ZERO = 12 };
static const uint8_t FP4_NUMBERS[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// Half of 2^(exponent - 127), the scale of such numbers.
INLINE vf half_power(vi exponent) {
    const vi smallest = (vi)(exponent == vi_splat(0)) & vi_splat(1 << 22);  // 2^-127, no normal number
    return (vf)(exponent << 23 | smallest) * vf_splat(0.5f);
}

// Ask for the lines of `bytes` from `from`. Addresses behind the weights do no harm.
INLINE void prefetch(const char *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

INLINE int64_t num_blocks(int64_t out_features) { return (out_features + BLOCK_COLS - 1) / BLOCK_COLS; }

// Whether products with this format take other activations than float32.
INLINE int converts_activations(const int format) { return format >= Q8_0 || (HAS_AMX && format == BF16); }

// Bytes of a row of activations of `in_features` numbers, for products in registers.
INLINE int64_t register_bytes(const int format, int64_t in_features) {
    if (format <= F16) return in_features * (int64_t)sizeof(float);
    return in_features / GROUP * (int64_t)(format == Q8_0 ? sizeof(Group16) : sizeof(Group8));
}

// Bytes of a row in an array of activations. With AMX it is that of a row for tiles, the longer one. Decodes come first,
// register_bytes apart; a prompt's row lies at its number times activation_bytes.
INLINE int64_t activation_bytes(const int format, int64_t in_features) {
#if HAS_AMX
    const int64_t groups = (in_features + GROUP - 1) / GROUP;
    if (converts_activations(format)) return groups * GROUP * (int64_t)sizeof(bf16) * (format <= Q8_0 ? 2 : 1);
#endif
    return register_bytes(format, in_features);
}
