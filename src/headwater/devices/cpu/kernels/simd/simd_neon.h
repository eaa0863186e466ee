// AArch64 with the dot product extension. Included by simd.h only.

#pragma once

#include <arm_neon.h>

INLINE vf vf_splat(float x) { return (vf)vdupq_n_f32(x); }
INLINE vi vi_splat(int32_t x) { return (vi)vdupq_n_s32(x); }
INLINE vf vf_fma(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
// Not vminq and vmaxq: they are NaN if either operand is.
INLINE vf vf_min(vf a, vf b) {
    const float32x4_t x = (float32x4_t)a, y = (float32x4_t)b;
    return (vf)vbslq_f32(vcltq_f32(x, y), x, y);
}
INLINE vf vf_max(vf a, vf b) {
    const float32x4_t x = (float32x4_t)a, y = (float32x4_t)b;
    return (vf)vbslq_f32(vcgtq_f32(x, y), x, y);
}
INLINE vf vf_sqrt(vf a) { return (vf)vsqrtq_f32((float32x4_t)a); }

INLINE vf vf_load_n(const float *from, int64_t n) {
    vf x = {0};
    memcpy(&x, from, (size_t)n * sizeof *from);
    return x;
}

INLINE void vf_store_n(float *to, vf x, int64_t n) { memcpy(to, &x, (size_t)n * sizeof *to); }

INLINE vf vf_load_f16(const f16 *from) { return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))); }

INLINE void vf_store_f16(f16 *to, vf x) { vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x))); }

INLINE float vf_sum(vf x) { return vaddvq_f32((float32x4_t)x); }
INLINE float vf_max_of(vf x) { return vmaxvq_f32((float32x4_t)x); }

INLINE vi vi_round(vf x) { return (vi)vcvtnq_s32_f32((float32x4_t)x); }  // to nearest, ties to even
INLINE vf vf_from_int(vi x) { return (vf)vcvtq_f32_s32((int32x4_t)x); }

INLINE vi vi_load_u8(const uint8_t *from) {
    uint32_t four;
    memcpy(&four, from, sizeof four);
    const uint16x8_t wide = vmovl_u8(vcreate_u8(four));
    return (vi)vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide)));
}

INLINE vi vi_load_s8(const int8_t *from) {
    uint32_t four;
    memcpy(&four, from, sizeof four);
    return (vi)vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four))));
}

INLINE vi vi_load_u16(const uint16_t *from) { return (vi)vreinterpretq_s32_u32(vmovl_u16(vld1_u16(from))); }

INLINE void vi_store_16(uint16_t *to, vi x) { vst1_u16(to, vmovn_u32(vreinterpretq_u32_s32((int32x4_t)x))); }

INLINE void vi_store_8(int8_t *to, vi x) {  // from -128 to 127
    const int16x4_t words = vmovn_s32((int32x4_t)x);
    const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
    memcpy(to, &bytes, 4);
}

// Sums of products of four uint8 and four int8 in a lane. The uint8 are below 128, so the signed product is right.
#define DOT4_MAX_SUM (1 << 20)
typedef vi dots;

INLINE dots dots_zero(void) { return (vi){0}; }

INLINE dots dot4(dots sum, vi u8, vi s8) {
    return (vi)vdotq_s32((int32x4_t)sum, vreinterpretq_s8_s32((int32x4_t)u8), vreinterpretq_s8_s32((int32x4_t)s8));
}

INLINE vi dots_sum(dots sum) { return sum; }

#if defined(__ARM_FEATURE_MATMUL_INT8)
#define HAS_MATRIX_DOT8  // linear/matrix_quads.h uses it for several rows

// Products of 2 x 8 by 8 x 2 int8: lane 2i + j of the sum is row i of `a` times row j of `b`, of eight bytes each.
INLINE vi matrix_dot8(vi sum, vi a, vi b) {
    return (vi)vmmlaq_s32((int32x4_t)sum, vreinterpretq_s8_s32((int32x4_t)a), vreinterpretq_s8_s32((int32x4_t)b));
}

INLINE vi vi_load_halves(const void *low, const void *high) {
    return (vi)vreinterpretq_s32_s8(vcombine_s8(vld1_s8(low), vld1_s8(high)));
}

// a0 b0 a1 b1, and a2 b2 a3 b3.
INLINE vi vi_zip_low(vi a, vi b) { return (vi)vzip1q_s32((int32x4_t)a, (int32x4_t)b); }
INLINE vi vi_zip_high(vi a, vi b) { return (vi)vzip2q_s32((int32x4_t)a, (int32x4_t)b); }

// a0 a1 b0 b1, and a2 a3 b2 b3.
INLINE vi vi_low_halves(vi a, vi b) {
    return (vi)vcombine_s32(vget_low_s32((int32x4_t)a), vget_low_s32((int32x4_t)b));
}
INLINE vi vi_high_halves(vi a, vi b) {
    return (vi)vcombine_s32(vget_high_s32((int32x4_t)a), vget_high_s32((int32x4_t)b));
}
#endif

INLINE vi dot2(vi sum, vi a, vi b) {
    const int16x8_t x = vreinterpretq_s16_s32((int32x4_t)a), y = vreinterpretq_s16_s32((int32x4_t)b);
    const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y)), high = vmull_high_s16(x, y);
    return sum + (vi)vpaddq_s32(low, high);
}

// The number of a table for each byte, which is below 16.
INLINE vi vi_look_up(const uint8_t table[16], vi index) {
    return (vi)vqtbl1q_u8(vld1q_u8(table), vreinterpretq_u8_s32((int32x4_t)index));
}

// Pairs of int8 as pairs of int16: one lane holds two.
INLINE vi vi_load_s8_pairs(const int8_t *from) { return (vi)vreinterpretq_s32_s16(vmovl_s8(vld1_s8(from))); }

// rows[i][j] -> columns[j][i], in place.
INLINE void vf_transpose(vf x[WIDTH]) {
    const float32x4_t a = vtrn1q_f32((float32x4_t)x[0], (float32x4_t)x[1]);
    const float32x4_t b = vtrn2q_f32((float32x4_t)x[0], (float32x4_t)x[1]);
    const float32x4_t c = vtrn1q_f32((float32x4_t)x[2], (float32x4_t)x[3]);
    const float32x4_t d = vtrn2q_f32((float32x4_t)x[2], (float32x4_t)x[3]);
    x[0] = (vf)vcombine_f32(vget_low_f32(a), vget_low_f32(c));
    x[1] = (vf)vcombine_f32(vget_low_f32(b), vget_low_f32(d));
    x[2] = (vf)vcombine_f32(vget_high_f32(a), vget_high_f32(c));
    x[3] = (vf)vcombine_f32(vget_high_f32(b), vget_high_f32(d));
}

// COLUMNS columns of WIDTH rows of 32-bit numbers: those from `byte` of each row on.
enum { COLUMNS = WIDTH };

INLINE void vf_load_columns(const uint8_t *const rows[WIDTH], int64_t byte, vf x[COLUMNS]) {
    for (int i = 0; i < WIDTH; i++) x[i] = (vf)vi_load(rows[i] + byte);
    vf_transpose(x);
}
