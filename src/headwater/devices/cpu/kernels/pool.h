// Threads that work on what is there to claim, and sleep when there has been nothing for a while.

#pragma once

#include <stdatomic.h>
#include <stdint.h>

// What the threads of all runs share. A claim comes first and reads what it claimed afterwards: a batch of chunks
// cannot end, hence not change, before each claimed chunk is done. Each line of the cache has its own kind of writes.
typedef struct {
    _Alignas(64) _Atomic int64_t unclaimed;  // chunks of the current batch that nobody has begun
    _Alignas(64) _Atomic int64_t is_done;    // the run of the caller has ended
    _Atomic int64_t num_helpers;             // workers that may claim; those with higher numbers stay away
    _Atomic int64_t num_sleeping;
} Pool;

extern Pool pool;

// Work on one chunk. 0 if there was none.
typedef int (*run_one)(void);

// Have that many workers, which call `function` for ever.
void pool_start(run_one function, int64_t num_workers);

// Work until `pool.is_done`.
void pool_join(run_one function);

// Wake the sleepers, because there are chunks to claim or the run has ended.
void pool_wake(void);
