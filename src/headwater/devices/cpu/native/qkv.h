// What happens to a step's queries, keys and values before attention.

#pragma once

#include "attention.h"

// Norm and rotate queries and keys, write keys and values to their pages.
void prepare_qkv(const Attention *job);
