// What the kernels of a recorded program share: the step, and the form of a kernel.
//
// A program is a list of ops. An op is a kernel and a job: the addresses and sizes that stay the same in every step.
// What changes is in `Step`. Letters: T tokens of the step, R rows (requests), S rows selected for logits.

#pragma once

#include <stdint.h>

typedef struct {
    int64_t num_tokens, num_rows, num_selected;  // T, R, S
    const int32_t *token_ids;     // [T]
    const int32_t *positions;     // [T] in their sequences
    const int32_t *query_starts;  // [R + 1]; row r computes tokens [query_starts[r], query_starts[r + 1])
    const int32_t *context_lens;  // [R], this step's tokens included
    const int32_t *page_tables;   // [R][table_stride]
    int64_t table_stride;
    const int32_t *selected;  // [S] tokens whose logits are wanted
    void *kv;                 // uint8[pages][page_bytes], the layout is devices/kv_memory.py's
    const int64_t *chunks;    // [num_chunks] row << 32 | first query: the work of attention, longest first
    int64_t num_chunks;
    // Attention, made with `chunks` by work_list of attention_kernels.py: a chunk is queries_per_chunk queries of a row,
    // fewer at the row's end. A row of a long context is split by blocks of keys: its chunks have (block + 1) << 48, and
    // its partial results lie in slots from partial_slots[row] on (-1: not split).
    int64_t queries_per_chunk;
    const int32_t *partial_slots;  // [R]
    // A negative chunk is a block that several rows of one query share: the same pages, as after a common prefix. They
    // are the row of the chunk and those that follow in this list, until -1. In place of the first query it has the number
    // of keys of the block that are common, a multiple of 32, or 0 for all.
    const int32_t *next_sharing;  // [R]; may be NULL if no chunk is negative
    // The first rows are decodes, of one token each; the others are parts of prompts. Of the selected tokens the first
    // `num_sampled` are sampled from. With AMX a row's kind decides how it is multiplied by weights: prompts in tiles,
    // decodes and the logits that are sampled from as without AMX. The kind is the plan's, so a prompt's last token alone
    // is a prompt.
    int64_t num_decodes, num_sampled;
    // Tokens with a LoRA adapter, those of one adapter together, and tiles of them: slot of the adapter, first of
    // adapter_rows, number of rows.
    const int32_t *adapter_rows;
    const int32_t *adapter_tiles;  // [num_adapter_tiles][3]
    int64_t num_adapter_tiles;
} Step;

enum Rows { TOKENS = 0, SELECTED = 1 };  // how many rows an op has: T or S

static inline int64_t num_rows_of(const Step *step, int rows) {
    return rows == TOKENS ? step->num_tokens : step->num_selected;
}

// How many of these rows, the first ones, are computed as decodes are.
static inline int64_t num_decodes_of(const Step *step, int rows) {
    return rows == TOKENS ? step->num_decodes : step->num_sampled;
}

// Rows of a chunk of an op that does little for each: more of them where there are many, since claims cost as well.
static inline int64_t rows_of_chunk(int64_t num_rows) { return num_rows < 256 ? 4 : 16; }

// Chunks of one op are independent of each other: whoever is free claims the next. Ops run one after another.
typedef struct {
    int64_t (*num_chunks)(const void *job, const Step *step);
    void (*run_chunk)(const void *job, const Step *step, int64_t chunk);
    int64_t has_ordered_rows;  // chunks are in the order of the rows that they read and write
} Kernel;

// A kernel `rms_norm` is exported as `const Kernel hw_rms_norm`, and its job is `RmsNormJob`. A job says which rows it
// has (`int64_t rows`, an enum Rows); arrays of the program are float[rows][width] without gaps between the rows.
// A ctypes structure of the same fields fills a job: program.py sets the addresses of the program's arrays by the
// fields' names (`x`, `y`, ...), and everything else once.
typedef struct {
    const Kernel *kernel;
    const void *job;
} Op;

// Run the ops one after another on `num_threads` threads, the caller's included. If `op_ns` is given, the nanoseconds
// of each op are added to it. Calls from several threads take turns.
void hw_run(const Op *ops, int64_t num_ops, const Step *step, int64_t num_threads, int64_t *op_ns);
