// Threads that work on what is there to claim, and sleep when there has been nothing for a while.

#pragma once

#include <stdatomic.h>
#include <stdint.h>

// What the threads of all runs share. A claim comes first and reads what it claimed afterwards: a batch of chunks
// cannot end, hence not change, before each claimed chunk is done. Each line of the cache has its own kind of writes.
typedef struct {
    // Chunks of the current batch that nobody has begun: [first, end) as end << 32 | first, and whether some threads
    // claim the last one first.
    _Alignas(64) _Atomic int64_t unclaimed;
    _Alignas(64) _Atomic int64_t is_done;    // the run of the caller has ended
    _Atomic int64_t num_helpers;             // workers that may claim; those with higher numbers stay away
    _Atomic int64_t num_sleeping;
} Pool;

extern Pool pool;

// Work on one chunk as thread `number` (the caller is 0). 0 if there was none.
typedef int (*run_one)(int64_t number);

#define FROM_BOTH_ENDS (1LL << 62)

static inline int64_t first_unclaimed(int64_t unclaimed) { return unclaimed & 0xffffffff; }
static inline int64_t end_unclaimed(int64_t unclaimed) { return (unclaimed & ~FROM_BOTH_ENDS) >> 32; }
static inline int is_claimed(int64_t unclaimed) { return first_unclaimed(unclaimed) >= end_unclaimed(unclaimed); }

// Have that many workers, which call `function` for ever.
void pool_start(run_one function, int64_t num_workers);

// Work until `pool.is_done`.
void pool_join(run_one function);

// Wake the sleepers, because there are chunks to claim or the run has ended.
void pool_wake(void);
