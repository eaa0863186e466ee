#define _GNU_SOURCE
#include "machine/pin.h"

#include <pthread.h>
#include <sched.h>
#include <string.h>

enum { MAX_THREADS = 256, MASK_BYTES = 128 };

#if defined(__linux__)

static cpu_set_t mask_of[MAX_THREADS], process_mask;
static int64_t num_pinned;

// Before the first run: `masks` holds Linux's bit masks of the CPUs of each thread, one after another, and `process` that
// of the whole process. Threads with higher numbers are not pinned.
void hw_pin_threads(const uint8_t *masks, int64_t num_threads, const uint8_t *process) {
    num_pinned = num_threads < MAX_THREADS ? num_threads : MAX_THREADS;
    for (int64_t i = 0; i < num_pinned; i++) memcpy(&mask_of[i], masks + i * MASK_BYTES, MASK_BYTES);
    memcpy(&process_mask, process, MASK_BYTES);
}

void pin_thread(int64_t number) {
    if (number < num_pinned) pthread_setaffinity_np(pthread_self(), MASK_BYTES, &mask_of[number]);
}

void unpin_caller(void) {
    if (num_pinned > 0) pthread_setaffinity_np(pthread_self(), MASK_BYTES, &process_mask);
}

#else

void hw_pin_threads(const uint8_t *masks, int64_t num_threads, const uint8_t *process) {
    (void)masks, (void)num_threads, (void)process;
}

void pin_thread(int64_t number) { (void)number; }

void unpin_caller(void) {}

#endif
