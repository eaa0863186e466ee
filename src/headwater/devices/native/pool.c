// A pool whose caller waits for chunks, not for threads. Where another process takes a core (the API process does,
// in every step), an OpenMP barrier waits until the thread that had been there runs again, also if it has nothing
// to do. Here a thread that is not running claims nothing, and the others do the work.

#define _GNU_SOURCE
#include "pool.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

enum { MAX_WORKERS = 255, SPINS_BEFORE_SLEEP = 4000, SPINS_BEFORE_YIELD = 1000 };

// Chunks of the current job not claimed yet. A claim comes first and reads the job afterwards: from then on the
// job cannot end, hence not change, before the claimed chunk is done.
static _Atomic long unclaimed;
static _Atomic long unfinished;
static chunk_function current_function;
static void *current_job;
static long current_num_chunks;

static int num_workers;
static _Atomic int num_sleeping;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work_arrived = PTHREAD_COND_INITIALIZER;

static int run_one_chunk(void) {
    long left = atomic_load(&unclaimed);
    do {
        if (left <= 0) return 0;
    } while (!atomic_compare_exchange_weak(&unclaimed, &left, left - 1));
    current_function(current_job, current_num_chunks - left);
    atomic_fetch_sub(&unfinished, 1);
    return 1;
}

static void *work(void *unused) {
    (void)unused;
    for (;;) {
        for (int spins = 0; spins < SPINS_BEFORE_SLEEP; spins++) {
            if (run_one_chunk()) spins = 0;
            else _mm_pause();
        }
        pthread_mutex_lock(&lock);
        atomic_fetch_add(&num_sleeping, 1);
        while (atomic_load(&unclaimed) <= 0) pthread_cond_wait(&work_arrived, &lock);
        atomic_fetch_sub(&num_sleeping, 1);
        pthread_mutex_unlock(&lock);
    }
    return NULL;
}

static void start_workers(int wanted) {
    while (num_workers < wanted && num_workers < MAX_WORKERS) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, NULL) != 0) return;  // fewer threads are slower, not wrong
        pthread_detach(thread);
        num_workers++;
    }
}

void pool_run(chunk_function function, void *job, long num_chunks, int threads) {
    if (threads <= 1 || num_chunks <= 1) {
        for (long chunk = 0; chunk < num_chunks; chunk++) function(job, chunk);
        return;
    }
    start_workers(threads - 1);
    current_function = function;
    current_job = job;
    current_num_chunks = num_chunks;
    atomic_store(&unfinished, num_chunks);
    atomic_store(&unclaimed, num_chunks);
    if (atomic_load(&num_sleeping) > 0) {
        pthread_mutex_lock(&lock);
        pthread_cond_broadcast(&work_arrived);
        pthread_mutex_unlock(&lock);
    }
    while (run_one_chunk()) {}
    for (int spins = 0; atomic_load(&unfinished) > 0; spins++) {
        if (spins < SPINS_BEFORE_YIELD) _mm_pause();
        else sched_yield();  // the thread we wait for may need this very core
    }
}
