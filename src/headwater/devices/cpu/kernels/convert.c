// Arrays of 16-bit numbers from float32 and back. NaN and infinities survive; rounding is to nearest, ties to even.

#include "simd.h"

// The last vector is done in a buffer: 16-bit loads and stores have no `_n` variant.
#define CONVERSION(name, From, To, vector_of, store)                       \
    void name(const From *from, To *to, int64_t count) {                   \
        int64_t i = 0;                                                     \
        for (; i + WIDTH <= count; i += WIDTH) store(to + i, vector_of(from + i)); \
        if (i == count) return;                                            \
        From last[WIDTH] = {0};                                            \
        To converted[WIDTH];                                               \
        memcpy(last, from + i, (size_t)(count - i) * sizeof *from);        \
        store(converted, vector_of(last));                                 \
        memcpy(to + i, converted, (size_t)(count - i) * sizeof *to);       \
    }

CONVERSION(hw_floats_of_bf16, bf16, float, vf_load_bf16, vf_store)
CONVERSION(hw_floats_of_f16, f16, float, vf_load_f16, vf_store)
CONVERSION(hw_bf16_of_floats, float, bf16, vf_load, vf_store_bf16)
CONVERSION(hw_f16_of_floats, float, f16, vf_load, vf_store_f16)
