// 1 / the root of the mean square, which RMSNorm multiplies with (arXiv 1910.07467).

#pragma once

#include <math.h>

#include "tile.h"

static inline float inverse_rms(const float *x, long size, float eps) {
    __m512 squares = _mm512_setzero_ps();
    for (long i = 0; i < size; i += 16) {
        const __mmask16 mask = size - i >= 16 ? 0xffff : (__mmask16)((1u << (size - i)) - 1);
        const __m512 value = _mm512_maskz_loadu_ps(mask, x + i);
        squares = _mm512_fmadd_ps(value, value, squares);
    }
    return 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / size + eps);
}
