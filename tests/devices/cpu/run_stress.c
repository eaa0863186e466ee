// Many short steps: every chunk of an op must see all chunks of the ops before it, and run once.
// run_stress THREADS STEPS; ends with 1 and a line for the first fault.

#include "step.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

enum { NUM_OPS = 40, MAX_CHUNKS = 24 };

typedef struct {
    int64_t number, chunks;
} Job;

static Job jobs[NUM_OPS];
static int64_t seen[NUM_OPS][MAX_CHUNKS];  // the step in which a chunk ran last; plain, so a missing barrier is a race
static _Atomic int64_t num_faults;

static int64_t num_chunks(const void *job, const Step *step) {
    return (((const Job *)job)->chunks + step->num_tokens) % (MAX_CHUNKS + 1);  // from none to all, changing
}

static void run_chunk(const void *job, const Step *step, int64_t chunk) {
    const int64_t number = ((const Job *)job)->number;
    for (int64_t before = 0; before < number; before++)
        for (int64_t other = 0; other < num_chunks(&jobs[before], step); other++)
            if (seen[before][other] != step->num_tokens) atomic_fetch_add(&num_faults, 1);
    if (seen[number][chunk] == step->num_tokens) atomic_fetch_add(&num_faults, 1);
    seen[number][chunk] = step->num_tokens;
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    const int64_t threads = atoi(argv[1]), steps = atoi(argv[2]);
    const Kernel kernels[2] = {  // whose chunks are claimed from one end, and from both
        {.num_chunks = num_chunks, .run_chunk = run_chunk},
        {.num_chunks = num_chunks, .run_chunk = run_chunk, .has_ordered_rows = 1},
    };
    Op ops[NUM_OPS];
    int64_t op_ns[NUM_OPS] = {0};
    for (int64_t i = 0; i < NUM_OPS; i++) {
        jobs[i] = (Job){.number = i, .chunks = i * 7 % 5};
        ops[i] = (Op){&kernels[i / 2 % 2], &jobs[i]};
    }
    for (int64_t i = 1; i <= steps; i++) {
        const Step step = {.num_tokens = i};
        // also with fewer threads than before, whose workers must stay away without harm
        hw_run(ops, NUM_OPS, &step, i % 3 ? threads : 1 + i % threads, i % 2 ? op_ns : NULL);
        for (int64_t op = 0; op < NUM_OPS; op++)
            for (int64_t chunk = 0; chunk < num_chunks(&jobs[op], &step); chunk++)
                if (seen[op][chunk] != i) atomic_fetch_add(&num_faults, 1);
        if (num_faults) {
            printf("step %ld: %ld faults\n", (long)i, (long)num_faults);
            return 1;
        }
    }
    for (int64_t op = 0; op < NUM_OPS; op++)
        if (op_ns[op] < 0) return printf("op %ld took %ld ns\n", (long)op, (long)op_ns[op]), 1;
    return 0;
}
