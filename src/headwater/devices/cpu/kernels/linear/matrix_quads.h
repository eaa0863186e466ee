// add_quads by products of 2 x 8 by 8 x 2 bytes: of two rows and two outputs, two quads at a time. The sums are the same.
// A last row without a partner is multiplied twice. Included by code_tile.h only.

#pragma once

INLINE void add_quads_of_pairs(
    const int format, const int rows, const int vectors, const int begin, const int end, const Group8 *x,
    int64_t x_stride, const char *const group[2], Dots *total) {
    vi sums[CODE_ROWS / 2][2 * VECTORS][2];  // of two rows: outputs 0 and 1 of a vector, and 2 and 3
#pragma GCC unroll 4
    for (int quad = begin; quad < end; quad += 2) {
        vi codes[2 * VECTORS][2];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            const vi first = load_codes(format, group[v / VECTORS], quad, v % VECTORS);
            const vi second = load_codes(format, group[v / VECTORS], quad + 1, v % VECTORS);
            codes[v][0] = vi_zip_low(first, second), codes[v][1] = vi_zip_high(first, second);
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r += 2) {
            const int partner = r + 1 < rows ? r + 1 : r;
            const vi values = vi_load_halves(x[r * x_stride].values + 4 * quad, x[partner * x_stride].values + 4 * quad);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) {
#pragma GCC unroll 2
                for (int i = 0; i < 2; i++) {
                    const vi sum = quad == begin ? vi_splat(0) : sums[r / 2][v][i];
                    sums[r / 2][v][i] = matrix_dot8(sum, values, codes[v][i]);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            const vi *pair = sums[r / 2][v];
            total->of[r][v] += r % 2 ? vi_high_halves(pair[0], pair[1]) : vi_low_halves(pair[0], pair[1]);
        }
}
