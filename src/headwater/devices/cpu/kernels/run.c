// One call runs a whole step: ops one after another, the chunks of an op claimed by whichever thread is free. The thread
// that ends the last chunk of an op begins the next op, so that no op waits for a thread that the system has stopped.

#define _GNU_SOURCE
#include "machine/pin.h"
#include "pool.h"
#include "step.h"

#include <pthread.h>
#include <time.h>

static _Alignas(64) _Atomic int64_t unfinished;  // chunks of the current op

// The run under way. Written between two ops, when no thread holds a chunk.
static struct {
    const Op *ops;
    int64_t num_ops, current;
    const Step *step;
    int64_t *op_ns;
    int64_t began_ns;  // the current op
} run;

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void end_op(void) {
    if (run.op_ns) {
        const int64_t now = now_ns();
        run.op_ns[run.current] += now - run.began_ns;
        run.began_ns = now;
    }
    run.current++;
}

// Go on to the next op with chunks for several threads; what one thread can do is done here. Ends the run after the
// last op.
static void advance(int64_t num_threads) {
    for (; run.current < run.num_ops; end_op()) {
        const Op *op = &run.ops[run.current];
        const int64_t num_chunks = op->kernel->num_chunks(op->job, run.step);
        if (num_chunks > 1 && num_threads > 1) {
            const int from_both_ends = op->kernel->has_ordered_rows && run.step->num_tokens > run.step->num_decodes;
            atomic_store(&unfinished, num_chunks);
            atomic_store(&pool.unclaimed, num_chunks << 32 | (from_both_ends ? FROM_BOTH_ENDS : 0));
            pool_wake();
            return;
        }
        for (int64_t chunk = 0; chunk < num_chunks; chunk++) op->kernel->run_chunk(op->job, run.step, chunk);
    }
    atomic_store(&pool.is_done, 1);
    pool_wake();
}

// In a prompt's step, every other thread claims the last rows in place of the first ones. So the same rows of op after op
// are computed by the same thread, which has them in its second cache, as long as all are equally fast.
static int64_t claim(int64_t number) {
    int64_t now = atomic_load_explicit(&pool.unclaimed, memory_order_relaxed), is_last;
    do {
        if (is_claimed(now)) return -1;
        is_last = number % 2 && now & FROM_BOTH_ENDS;
    } while (!atomic_compare_exchange_weak(&pool.unclaimed, &now, now + (is_last ? -(1LL << 32) : 1)));
    return is_last ? end_unclaimed(now) - 1 : first_unclaimed(now);
}

static int run_one_chunk(int64_t number) {
    const int64_t chunk = claim(number);
    if (chunk < 0) return 0;
    const Op *op = &run.ops[run.current];
    op->kernel->run_chunk(op->job, run.step, chunk);
    if (atomic_fetch_sub(&unfinished, 1) == 1) {
        end_op();
        advance(2);
    }
    return 1;
}

void hw_run(const Op *ops, int64_t num_ops, const Step *step, int64_t num_threads, int64_t *op_ns) {
    static pthread_mutex_t one_run = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&one_run);
    run.ops = ops, run.num_ops = num_ops, run.current = 0, run.step = step, run.op_ns = op_ns;
    if (op_ns) run.began_ns = now_ns();
    atomic_store(&pool.is_done, 0);
    if (num_threads > 1) {
        pin_thread(0);
        pool_start(run_one_chunk, num_threads - 1);
    }
    advance(num_threads);
    pool_join(run_one_chunk);
    if (num_threads > 1) unpin_caller();
    pthread_mutex_unlock(&one_run);
}
