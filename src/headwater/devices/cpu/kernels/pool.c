// The caller waits for chunks, not for threads. Where another process takes a core (the API process does, in every
// step), a barrier of threads waits until the thread that had been there runs again, also if it has nothing to do. Here
// a thread that is not running claims nothing, and the others do the work. A thread with nothing to claim spins for
// about 0.1 ms, then sleeps: a spinning thread may keep the core from the one that works. (Not to spin at all after
// others had taken the core made decoding a third slower on two busy cores: every wait then ends with a wake-up.)

#define _GNU_SOURCE
#include "machine/pin.h"
#include "pool.h"

#include <pthread.h>

enum { MAX_WORKERS = 255, SPINS_BEFORE_SLEEP = 4000 };

Pool pool;
static int64_t num_workers;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");  // `yield` does nothing on most cores
#endif
}

typedef struct {
    run_one function;
    int64_t number;  // -1: the caller
} Worker;

static int may_claim(const Worker *worker) {
    return worker->number < atomic_load_explicit(&pool.num_helpers, memory_order_relaxed);
}

static int has_to_wake(const Worker *worker) {
    if (worker->number < 0 && atomic_load(&pool.is_done)) return 1;
    return may_claim(worker) && !is_claimed(atomic_load(&pool.unclaimed));
}

static void sleep_until_changed(const Worker *worker) {
    pthread_mutex_lock(&lock);
    atomic_fetch_add(&pool.num_sleeping, 1);
    while (!has_to_wake(worker)) pthread_cond_wait(&changed, &lock);
    atomic_fetch_sub(&pool.num_sleeping, 1);
    pthread_mutex_unlock(&lock);
}

// Work, spin, sleep; the caller until its run has ended, a worker for ever.
static void work(const Worker *worker) {
    for (;;) {
        for (int spins = SPINS_BEFORE_SLEEP; spins > 0; spins--) {
            if (may_claim(worker) && worker->function(worker->number + 1)) spins = SPINS_BEFORE_SLEEP;
            else if (worker->number < 0 && atomic_load(&pool.is_done)) return;
            else relax();
        }
        sleep_until_changed(worker);
    }
}

static void *work_for_ever(void *opaque) {
    const Worker *worker = opaque;
    pin_thread(worker->number + 1);
    work(worker);
    return NULL;
}

void pool_start(run_one function, int64_t wanted) {
    static Worker workers[MAX_WORKERS];
    if (wanted > MAX_WORKERS) wanted = MAX_WORKERS;
    for (; num_workers < wanted; num_workers++) {
        Worker *worker = &workers[num_workers];
        *worker = (Worker){function, num_workers};
        pthread_t thread;
        if (pthread_create(&thread, NULL, work_for_ever, worker) != 0) break;  // fewer threads are slower, not wrong
        pthread_detach(thread);
    }
    atomic_store(&pool.num_helpers, wanted);
}

void pool_join(run_one function) {
    const Worker caller = {function, -1};
    work(&caller);
}

void pool_wake(void) {
    if (atomic_load(&pool.num_sleeping) == 0) return;
    pthread_mutex_lock(&lock);
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}
