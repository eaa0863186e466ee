// A pool whose caller waits for chunks, not for threads. Where another process takes a core (the API process does,
// in every step), an OpenMP barrier waits until the thread that had been there runs again, also if it has nothing
// to do. Here a thread that is not running claims nothing, and the others do the work. Who waits spins for
// about 0.1 ms, then sleeps: a spinning thread may keep the core from the one that works. (Not to spin at all after
// others had taken the core made decoding a third slower on two busy cores: every wait then ends with a wake-up.)

#define _GNU_SOURCE
#include "pool.h"

#include <immintrin.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

enum { MAX_WORKERS = 255, SPINS_BEFORE_SLEEP = 4000, SPINS_OF_CALLER = 2000 };

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
static pthread_cond_t work_done = PTHREAD_COND_INITIALIZER;
static _Atomic int is_caller_asleep;

static int run_one_chunk(void) {
    long left = atomic_load(&unclaimed);
    do {
        if (left <= 0) return 0;
    } while (!atomic_compare_exchange_weak(&unclaimed, &left, left - 1));
    current_function(current_job, current_num_chunks - left);
    if (atomic_fetch_sub(&unfinished, 1) == 1 && atomic_load(&is_caller_asleep)) {
        pthread_mutex_lock(&lock);
        pthread_cond_signal(&work_done);
        pthread_mutex_unlock(&lock);
    }
    return 1;
}

static void *work(void *unused) {
    (void)unused;
    for (;;) {
        while (run_one_chunk()) {}
        for (int spins = SPINS_BEFORE_SLEEP; spins > 0; spins--) {
            if (run_one_chunk()) spins = SPINS_BEFORE_SLEEP;
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

// The caller has nothing left to claim; others still compute what they claimed.
static void wait_for_workers(void) {
    if (atomic_load(&unfinished) == 0) return;
    for (int spins = SPINS_OF_CALLER; spins > 0; spins--) {
        if (atomic_load(&unfinished) == 0) return;
        _mm_pause();
    }
    pthread_mutex_lock(&lock);
    atomic_store(&is_caller_asleep, 1);
    while (atomic_load(&unfinished) > 0) pthread_cond_wait(&work_done, &lock);
    atomic_store(&is_caller_asleep, 0);
    pthread_mutex_unlock(&lock);
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
    wait_for_workers();
}
