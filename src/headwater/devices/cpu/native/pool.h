// Share the chunks of a job among threads that claim them one by one.

#pragma once

typedef void (*chunk_function)(void *job, long chunk);

// Call function(job, chunk) once for each chunk in [0, num_chunks), on this thread and up to threads - 1 others.
// Returns when all have run. Must be called from one thread only.
void pool_run(chunk_function function, void *job, long num_chunks, int threads);
