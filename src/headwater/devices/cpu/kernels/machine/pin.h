// Threads that stay on their cores.

#pragma once

#include <stdint.h>

// Keep the calling thread on the core of thread `number` of the pool; 0 is the caller of hw_run. Nothing happens if the
// threads are not to be pinned, or if the system refuses.
void pin_thread(int64_t number);

// The caller of hw_run may run anywhere again: it starts other threads, which inherit where they may run.
void unpin_caller(void);
