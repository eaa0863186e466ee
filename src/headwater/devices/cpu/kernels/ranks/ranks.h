// Processes that compute one model together, and meet in shared memory. devices/cpu/ranks/ has the Python side.
//
// Every rank runs the same ops, so the n-th meeting is the same one for all. Meetings alternate between two buffers:
// who writes to a buffer again has passed the meeting in between, and everybody came to it after reading.

#pragma once

#include <stdatomic.h>
#include <stdint.h>

// What a rank shows the others: a line of the cache in the segment. On 32 bits, as futexes are.
typedef struct {
    _Alignas(64) _Atomic uint32_t arrived;  // the number of its newest meeting
    _Atomic uint32_t num_waiting;           // ranks that sleep until `arrived` changes
    _Atomic int64_t pid;
} RankLine;

enum RankFailure { NONE = 0, ENDED = 1, SILENT = 2, ABORTED = 3, TOO_LARGE = 4 };

// One rank's view of the group, in its own memory. A ctypes structure of the same fields fills it.
typedef struct {
    void *lines;    // RankLine[size]
    void *aborted;  // _Atomic int64_t: 0, or 1 + a rank that failed
    void *buffers;  // uint8[2][buffer_bytes]
    int64_t buffer_bytes, rank, size, limit_ns;
    int64_t num_meetings;          // so far
    int64_t failed_rank, failure;  // enum RankFailure. A group that has failed waits no more
} RankState;

static inline uint8_t *rank_buffer(const RankState *ranks, int64_t meeting) {
    return (uint8_t *)ranks->buffers + (meeting & 1) * ranks->buffer_bytes;
}
