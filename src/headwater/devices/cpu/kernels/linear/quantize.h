// One row of activations, for products in registers.

#pragma once

#include "packed.h"

// x float32[in_features] -> y, register_bytes(format, in_features) long.
void activations_for_registers(int format, const float *x, int64_t in_features, void *y);
