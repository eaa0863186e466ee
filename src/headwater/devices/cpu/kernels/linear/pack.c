// From rows as they lie in a file (plain numbers, or GGUF blocks) to packed weights. Codes and scales are moved as they
// are. The layout of GGUF's blocks: ggml-common.h of https://github.com/ggml-org/llama.cpp.

#include "packed.h"

enum { Q8_0_BYTES = 34, Q4_0_BYTES = 18, Q4_1_BYTES = 20, Q4_K_BYTES = 144, Q5_K_BYTES = 176, Q6_K_BYTES = 210,
       MXFP4_BYTES = 17 };

// Codes of 32 inputs of a column into a group.
INLINE void store_column(const int format, const uint8_t codes[GROUP], int64_t col, uint8_t *group) {
    uint32_t quads[8];
    memcpy(quads, codes, sizeof quads);
    for (int j = 0; j < 4; j++) {
        const uint32_t word = (quads[2 * j] & 0x0f0f0f0fu) | (quads[2 * j + 1] & 0x0f0f0f0fu) << 4;
        memcpy(group + j * 64 + col * 4, &word, sizeof word);
    }
    uint32_t plane[2] = {0, 0};
    for (int q = 0; q < 8; q++) {
        if (format == Q5_K) plane[0] |= (quads[q] >> 4 & 0x01010101u) << q;
        if (format == Q6_K) plane[q / 4] |= (quads[q] >> 4 & 0x03030303u) << q % 4 * 2;
    }
    if (format == Q5_K || format == Q6_K) memcpy(group + CODE_BYTES + col * 4, &plane[0], sizeof plane[0]);
    if (format == Q6_K) memcpy(group + CODE_BYTES + 64 + col * 4, &plane[1], sizeof plane[1]);
}

INLINE void copy_16(uint8_t *to, int64_t col, const uint8_t *from) { memcpy(to + 2 * col, from, 2); }

static void pack_q8_0(const uint8_t *row, int64_t in_features, int64_t col, uint8_t *block) {
    for (int64_t g = 0; g < in_features / GROUP; g++, row += Q8_0_BYTES, block += group_bytes(Q8_0)) {
        for (int k = 0; k < GROUP; k += 2) memcpy(block + k * BLOCK_COLS + col * 2, row + 2 + k, 2);
        copy_16(block + GROUP * BLOCK_COLS, col, row);
    }
}

// 16 bytes whose low nibbles are codes 0 to 15 and whose high nibbles are codes 16 to 31: the most common case, without
// taking the codes apart.
INLINE void store_nibbles(const uint8_t *bytes, int64_t col, uint8_t *group) {
    const uint32_t low = 0x0f0f0f0fu;
    uint32_t w[4];
    memcpy(w, bytes, sizeof w);
    const uint32_t out[4] = {
        (w[0] & low) | (w[1] & low) << 4,
        (w[2] & low) | (w[3] & low) << 4,
        (w[0] >> 4 & low) | (w[1] & ~low),
        (w[2] >> 4 & low) | (w[3] & ~low),
    };
    for (int j = 0; j < 4; j++) memcpy(group + j * 64 + col * 4, &out[j], sizeof out[j]);
}

INLINE void pack_q4(const int format, const uint8_t *row, int64_t in_features, int64_t col, uint8_t *block) {
    const int head = format == Q4_0 ? 2 : 4;
    for (int64_t g = 0; g < in_features / GROUP; g++, row += head + 16, block += group_bytes(format)) {
        store_nibbles(row + head, col, block);
        copy_16(block + CODE_BYTES, col, row);
        if (format == Q4_1) copy_16(block + CODE_BYTES + 2 * BLOCK_COLS, col, row + 2);
    }
}

static void pack_mxfp4(const uint8_t *row, int64_t in_features, int64_t col, uint8_t *block) {
    for (int64_t g = 0; g < in_features / GROUP; g++, row += MXFP4_BYTES, block += group_bytes(MXFP4)) {
        store_nibbles(row + 1, col, block);
        block[CODE_BYTES + col] = row[0];
    }
}

// Scale and minimum of group `j` of a super group: 6 bits each, in 12 bytes.
INLINE void load_six_bits(const uint8_t *packed, int j, uint8_t *scale, uint8_t *min) {
    if (j < 4) {
        *scale = packed[j] & 63, *min = packed[j + 4] & 63;
    } else {
        *scale = (uint8_t)((packed[j + 4] & 15) | packed[j - 4] >> 6 << 4);
        *min = (uint8_t)(packed[j + 4] >> 4 | packed[j] >> 6 << 4);
    }
}

INLINE void pack_q45_k(const int format, const uint8_t *row, int64_t in_features, int64_t col, uint8_t *block) {
    for (int64_t s = 0; s < in_features / SUPER_GROUP; s++, row += format == Q4_K ? Q4_K_BYTES : Q5_K_BYTES) {
        copy_16(block, col, row);
        copy_16(block + 2 * BLOCK_COLS, col, row + 2);
        block += super_bytes(format);
        const uint8_t *high = row + 16, *nibbles = format == Q4_K ? row + 16 : row + 48;
        for (int j = 0; j < 8; j++, block += group_bytes(format)) {
            uint8_t codes[GROUP];
            for (int i = 0; i < GROUP; i++) {
                const uint8_t byte = nibbles[j / 2 * GROUP + i];
                codes[i] = j & 1 ? byte >> 4 : byte & 15;
                if (format == Q5_K) codes[i] |= (uint8_t)((high[i] >> j & 1) << 4);
            }
            store_column(format, codes, col, block);
            uint8_t *end = block + group_bytes(format) - 2 * BLOCK_COLS;
            load_six_bits(row + 4, j, &end[col], &end[BLOCK_COLS + col]);
        }
    }
}

static void pack_q6_k(const uint8_t *row, int64_t in_features, int64_t col, uint8_t *block) {
    for (int64_t s = 0; s < in_features / SUPER_GROUP; s++, row += Q6_K_BYTES) {
        copy_16(block, col, row + 208);
        block += super_bytes(Q6_K);
        for (int j = 0; j < 8; j++, block += group_bytes(Q6_K)) {  // four groups share 64 + 32 bytes
            const uint8_t *low = row + j / 4 * 64 + j % 2 * GROUP, *high = row + 128 + j / 4 * GROUP;
            uint8_t codes[GROUP];
            for (int i = 0; i < GROUP; i++) {
                const uint8_t nibble = j % 4 < 2 ? low[i] & 15 : low[i] >> 4;
                codes[i] = (uint8_t)(nibble | (high[i] >> j % 4 * 2 & 3) << 4);
            }
            store_column(Q6_K, codes, col, block);
            uint8_t *end = block + group_bytes(Q6_K) - 2 * BLOCK_COLS;
            for (int half = 0; half < 2; half++) end[half * BLOCK_COLS + col] = row[192 + 2 * j + half];
        }
    }
}

// 16 rows (or the last few) of plain numbers at once, so that a block is written in order.
static void pack_plain(
    int64_t format, const uint8_t *rows, int64_t row_bytes, int64_t cols, int64_t in_features, uint8_t *block) {
    for (int64_t k = 0; k < in_features; k++) {
        for (int64_t col = 0; col < cols; col++) {
            const uint8_t *row = rows + col * row_bytes;
            if (format == F32) memcpy(block + (k * BLOCK_COLS + col) * 4, row + k * 4, 4);
            else if (format == F16) memcpy(block + (k * BLOCK_COLS + col) * 2, row + k * 2, 2);
            else memcpy(block + ((k / 2 * BLOCK_COLS + col) * 2 + k % 2) * 2, row + k * 2, 2);
        }
    }
}

// Rows [num_rows] of `row_bytes` each; row n becomes column n % 16 of the block at packed + n / 16 * block_stride. The
// blocks hold zeros: columns without a row stay zero.
void hw_pack(
    int64_t format, const uint8_t *rows, int64_t row_bytes, int64_t num_rows, int64_t in_features, uint8_t *packed,
    int64_t block_stride) {
    for (int64_t first = 0; first < num_rows; first += BLOCK_COLS, packed += block_stride) {
        const int64_t cols = num_rows - first < BLOCK_COLS ? num_rows - first : BLOCK_COLS;
        const uint8_t *row = rows + first * row_bytes;
        if (format <= F16) pack_plain(format, row, row_bytes, cols, in_features, packed);
        for (int64_t col = 0; col < cols; col++, row += row_bytes) {
            if (format == Q8_0) pack_q8_0(row, in_features, col, packed);
            if (format == Q4_0) pack_q4(Q4_0, row, in_features, col, packed);
            if (format == Q4_1) pack_q4(Q4_1, row, in_features, col, packed);
            if (format == Q4_K) pack_q45_k(Q4_K, row, in_features, col, packed);
            if (format == Q5_K) pack_q45_k(Q5_K, row, in_features, col, packed);
            if (format == Q6_K) pack_q6_k(row, in_features, col, packed);
            if (format == MXFP4) pack_mxfp4(row, in_features, col, packed);
        }
    }
}

// Bytes of a block of 16 outputs in a format, and of one row of its activations.
int64_t hw_block_bytes(int64_t format, int64_t in_features) { return block_bytes((int)format, in_features); }

int64_t hw_converts_activations(int64_t format) { return converts_activations((int)format); }

int64_t hw_register_bytes(int64_t format, int64_t in_features) { return register_bytes((int)format, in_features); }

int64_t hw_activation_bytes(int64_t format, int64_t in_features) { return activation_bytes((int)format, in_features); }
