// AMX: eight tiles of up to 16 rows of 64 bytes, and products of tiles.
//
// Whoever works with tiles configures them first and releases them at the end of the chunk: a configuration belongs to
// a thread, and other ops want others. Rows and bytes of a row that a configuration leaves out are neither read nor
// written. `t`, `c`, `a` and `b` are literal numbers of tiles.
//
//   tile_zero(t), tile_load(t, from, stride), tile_store(t, to, stride)    stride in bytes
//   tile_load_once(t, from, stride)   of what is not wanted again soon: it goes past the first cache
//   tile_dot_bf16(c, a, b)   c[m][n] += sum over k of a[m][k] * b[k / 2][2 n + k % 2], float32 += bfloat16 * bfloat16
//   tile_dot_ss(c, a, b)     c[m][n] += sum over k of a[m][k] * b[k / 4][4 n + k % 4], int32 += int8 * int8
//   tile_dot_su, _us, _uu    the same of unsigned bytes: the first letter is a's, the second b's
//
// Each row of c depends on the same row of a and on b only. HEADWATER_EMULATE_AMX puts plain C in the place of the
// instructions, so that tests run on any processor.

#pragma once

#include "simd.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define HAS_AMX 1
#elif defined(HEADWATER_EMULATE_AMX)
#define HAS_AMX 1
#else
#define HAS_AMX 0
#endif

#if HAS_AMX

enum { NUM_TILES = 8, AMX_ROWS = 16, AMX_BYTES = 64 };

typedef struct {  // as the processor wants it
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;

#endif

#if HAS_AMX && !defined(HEADWATER_EMULATE_AMX)

INLINE void tiles_configure(const TileConfig *config) { __asm__ volatile("ldtilecfg %0" ::"m"(*config)); }
INLINE void tiles_release(void) { __asm__ volatile("tilerelease"); }

// Not the compilers' intrinsics: gcc's load lets stores to the same memory move behind it.
#define tile_zero(t) __asm__ volatile("tilezero %%tmm" #t ::)
#define tile_load(t, from, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(from), "r"((int64_t)(stride)) : "memory")
#define tile_load_once(t, from, stride) \
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm" #t ::"r"(from), "r"((int64_t)(stride)) : "memory")
#define tile_store(t, to, stride) \
    __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(to), "r"((int64_t)(stride)) : "memory")
#define tile_dot_bf16(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)
#define tile_dot_ss(c, a, b) __asm__ volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)
#define tile_dot_su(c, a, b) __asm__ volatile("tdpbsud %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)
#define tile_dot_us(c, a, b) __asm__ volatile("tdpbusd %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)
#define tile_dot_uu(c, a, b) __asm__ volatile("tdpbuud %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)

#elif HAS_AMX

static _Thread_local struct {
    TileConfig config;
    _Alignas(64) uint8_t bytes[NUM_TILES][AMX_ROWS][AMX_BYTES];
} emulated;

static inline void tiles_configure(const TileConfig *config) {
    memset(&emulated, 0, sizeof emulated);
    emulated.config = *config;
}

static inline void tiles_release(void) { memset(&emulated, 0, sizeof emulated); }

#define tile_zero(t) memset(emulated.bytes[t], 0, sizeof emulated.bytes[t])
#define tile_load(t, from, stride) emulate_load(t, from, stride)
#define tile_load_once(t, from, stride) emulate_load(t, from, stride)
#define tile_store(t, to, stride) emulate_store(t, to, stride)
#define tile_dot_bf16(c, a, b) emulate_dot_bf16(c, a, b)
#define tile_dot_ss(c, a, b) emulate_dot_bytes(c, a, b, 1, 1)
#define tile_dot_su(c, a, b) emulate_dot_bytes(c, a, b, 1, 0)
#define tile_dot_us(c, a, b) emulate_dot_bytes(c, a, b, 0, 1)
#define tile_dot_uu(c, a, b) emulate_dot_bytes(c, a, b, 0, 0)

__attribute__((unused)) static void emulate_load(int t, const void *from, int64_t stride) {
    memset(emulated.bytes[t], 0, sizeof emulated.bytes[t]);
    for (int row = 0; row < emulated.config.rows[t]; row++) {
        memcpy(emulated.bytes[t][row], (const uint8_t *)from + row * stride, emulated.config.row_bytes[t]);
    }
}

__attribute__((unused)) static void emulate_store(int t, void *to, int64_t stride) {
    for (int row = 0; row < emulated.config.rows[t]; row++) {
        memcpy((uint8_t *)to + row * stride, emulated.bytes[t][row], emulated.config.row_bytes[t]);
    }
}

// As of the processor: subnormal numbers are zero.
INLINE float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? 0.0f : x; }

// Two sums, of the first and of the second numbers of the pairs, in the order of the rows of b.
__attribute__((unused)) static void emulate_dot_bf16(int c, int a, int b) {
    const int num_cols = emulated.config.row_bytes[c] / 4, num_pairs = emulated.config.row_bytes[a] / 4;
    for (int row = 0; row < emulated.config.rows[c]; row++) {
        float first[16] = {0}, second[16] = {0}, sums[16];
        for (int pair = 0; pair < num_pairs; pair++) {
            bf16 left[2], right[32];
            memcpy(left, emulated.bytes[a][row] + 4 * pair, sizeof left);
            memcpy(right, emulated.bytes[b][pair], sizeof right);
            const float left_0 = flushed(float_of_bf16(left[0])), left_1 = flushed(float_of_bf16(left[1]));
            for (int col = 0; col < 16; col++) {
                const float right_0 = flushed(float_of_bf16(right[2 * col]));
                const float right_1 = flushed(float_of_bf16(right[2 * col + 1]));
                first[col] = flushed(__builtin_fmaf(left_0, right_0, first[col]));
                second[col] = flushed(__builtin_fmaf(left_1, right_1, second[col]));
            }
        }
        memcpy(sums, emulated.bytes[c][row], sizeof sums);
        for (int col = 0; col < num_cols; col++) sums[col] = flushed(flushed(sums[col]) + flushed(first[col] + second[col]));
        memcpy(emulated.bytes[c][row], sums, sizeof sums);
    }
}

__attribute__((unused)) static void emulate_dot_bytes(int c, int a, int b, int is_a_signed, int is_b_signed) {
    const int num_cols = emulated.config.row_bytes[c] / 4, num_fours = emulated.config.row_bytes[a] / 4;
    for (int row = 0; row < emulated.config.rows[c]; row++) {
        int32_t sums[16];
        memcpy(sums, emulated.bytes[c][row], sizeof sums);
        for (int k = 0; k < 4 * num_fours; k++) {
            const uint8_t byte = emulated.bytes[a][row][k];
            const int32_t left = is_a_signed ? (int8_t)byte : byte;
            for (int col = 0; col < num_cols; col++) {
                const uint8_t other = emulated.bytes[b][k / 4][4 * col + k % 4];
                sums[col] += left * (is_b_signed ? (int8_t)other : other);
            }
        }
        memcpy(emulated.bytes[c][row], sums, sizeof sums);
    }
}

#endif
