// Sums over ranks in three ops: every rank writes its numbers to its columns of a shared buffer, all meet, every rank
// adds up the columns in the order of the ranks. So all ranks have equal bits.

#define _GNU_SOURCE
#include "ranks/ranks.h"

#include "simd.h"
#include "step.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <linux/futex.h>
#include <poll.h>
#include <sys/syscall.h>
#endif

enum { ROWS_PER_CHUNK = 4, SPINS = 1000, NAP_NS = 2000000, NAPS_PER_LOOK = 8 };

static void fail(RankState *ranks, int64_t rank, int64_t failure) {
    ranks->failed_rank = rank;
    ranks->failure = failure;
    int64_t none = 0;  // the others fail now, not at the end of their own patience
    atomic_compare_exchange_strong((_Atomic int64_t *)ranks->aborted, &none, 1 + rank);
}

// --- publish -----------------------------------------------------------------------------------------

typedef struct {
    const void *ranks;  // RankState
    const void *x;      // uint8[rows][row_bytes]
    int64_t row_bytes;
    int64_t start;          // of the first row in the buffer, in bytes
    int64_t stride, first;  // bytes of a row of all ranks, and where this rank's part begins in it
    int64_t is_wanted;      // 0: not in this step
    int64_t rows;
} PublishJob;

static int64_t publish_chunks(const void *opaque, const Step *step) {
    const PublishJob *job = opaque;
    return job->is_wanted ? (num_rows_of(step, (int)job->rows) + ROWS_PER_CHUNK - 1) / ROWS_PER_CHUNK : 0;
}

static void publish_chunk(const void *opaque, const Step *step, int64_t chunk) {
    const PublishJob *job = opaque;
    RankState *ranks = (RankState *)job->ranks;
    const int64_t rows = num_rows_of(step, (int)job->rows), end = (chunk + 1) * ROWS_PER_CHUNK;
    if (job->start + rows * job->stride > ranks->buffer_bytes) {
        fail(ranks, ranks->rank, TOO_LARGE);
        return;
    }
    uint8_t *buffer = rank_buffer(ranks, ranks->num_meetings) + job->start + job->first;
    for (int64_t row = chunk * ROWS_PER_CHUNK; row < end && row < rows; row++) {
        memcpy(buffer + row * job->stride, (const uint8_t *)job->x + row * job->row_bytes, (size_t)job->row_bytes);
    }
}

const Kernel hw_publish = {.num_chunks = publish_chunks, .run_chunk = publish_chunk};

// --- meet --------------------------------------------------------------------------------------------

typedef struct {
    const void *ranks;
} MeetJob;

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

// Sleep for a moment, or until the rank has arrived somewhere.
static void nap(RankLine *line, uint32_t seen) {
    const struct timespec moment = {0, NAP_NS};
#ifdef __linux__
    atomic_fetch_add(&line->num_waiting, 1);
    syscall(SYS_futex, &line->arrived, FUTEX_WAIT, seen, &moment, NULL, 0);
    atomic_fetch_sub(&line->num_waiting, 1);
#else
    (void)line, (void)seen;
    nanosleep(&moment, NULL);
#endif
}

// A process that has ended and has not been waited for still takes signals, so its descriptor is asked.
static int has_ended(int64_t pid) {
    if (pid == 0) return 0;  // it has not begun
#if defined(__linux__) && defined(SYS_pidfd_open)
    const int descriptor = (int)syscall(SYS_pidfd_open, (pid_t)pid, 0);
    if (descriptor >= 0) {
        struct pollfd ended = {descriptor, POLLIN, 0};
        const int found = poll(&ended, 1, 0);
        close(descriptor);
        return found == 1;
    }
    if (errno == ESRCH) return 1;
#endif
    return kill((pid_t)pid, 0) != 0 && errno == ESRCH;
}

static int is_there(const RankLine *line, uint32_t meeting) {
    return (int32_t)(atomic_load(&line->arrived) - meeting) >= 0;
}

static void wait_for(RankState *ranks, int64_t peer, uint32_t meeting) {
    RankLine *line = (RankLine *)ranks->lines + peer;
    for (int spins = 0; spins < SPINS; spins++) {
        if (is_there(line, meeting)) return;
        relax();
    }
    const int64_t begin = now_ns();
    for (int64_t naps = 1;; naps++) {
        const uint32_t seen = atomic_load(&line->arrived);
        if (is_there(line, meeting)) return;
        const int64_t aborted = atomic_load((_Atomic int64_t *)ranks->aborted);
        if (aborted) return fail(ranks, aborted - 1, ABORTED);
        nap(line, seen);
        if (now_ns() - begin > ranks->limit_ns) return fail(ranks, peer, SILENT);
        // it may have arrived and ended since
        if (naps % NAPS_PER_LOOK == 0 && has_ended(atomic_load(&line->pid)) && !is_there(line, meeting)) {
            return fail(ranks, peer, ENDED);
        }
    }
}

static int64_t meet_chunks(const void *job, const Step *step) {
    (void)job, (void)step;
    return 1;
}

static void meet_chunk(const void *opaque, const Step *step, int64_t chunk) {
    (void)step, (void)chunk;
    RankState *ranks = (RankState *)((const MeetJob *)opaque)->ranks;
    if (ranks->failure != NONE) return;
    const uint32_t meeting = (uint32_t)++ranks->num_meetings;
    RankLine *own = (RankLine *)ranks->lines + ranks->rank;
    atomic_store(&own->arrived, meeting);
#ifdef __linux__
    if (atomic_load(&own->num_waiting)) syscall(SYS_futex, &own->arrived, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
#endif
    for (int64_t peer = 0; peer < ranks->size && ranks->failure == NONE; peer++) {
        if (peer != ranks->rank) wait_for(ranks, peer, meeting);
    }
}

const Kernel hw_meet = {.num_chunks = meet_chunks, .run_chunk = meet_chunk};

// --- add up ------------------------------------------------------------------------------------------

typedef struct {
    const void *ranks;
    float *y;           // [rows][width]
    int64_t width;      // the buffer has [rows][size][width] from its begin on
    int64_t keeps;      // 0: y = the sum; 1: y += the sum
    int64_t rows;
} AddRanksJob;

static int64_t add_ranks_chunks(const void *opaque, const Step *step) {
    const AddRanksJob *job = opaque;
    return (num_rows_of(step, (int)job->rows) + ROWS_PER_CHUNK - 1) / ROWS_PER_CHUNK;
}

static void add_row(const float *parts, float *y, int64_t width, int64_t size, int64_t keeps) {
    const int64_t whole = width / WIDTH * WIDTH;
    for (int64_t i = 0; i < whole; i += WIDTH) {
        vf sum = vf_load(parts + i);
        for (int64_t rank = 1; rank < size; rank++) sum = sum + vf_load(parts + rank * width + i);
        vf_store(y + i, keeps ? vf_load(y + i) + sum : sum);
    }
    for (int64_t i = whole; i < width; i++) {
        float sum = parts[i];
        for (int64_t rank = 1; rank < size; rank++) sum += parts[rank * width + i];
        y[i] = keeps ? y[i] + sum : sum;
    }
}

static void add_ranks_chunk(const void *opaque, const Step *step, int64_t chunk) {
    const AddRanksJob *job = opaque;
    const RankState *ranks = job->ranks;
    if (ranks->failure != NONE) return;
    const float *buffer = (const float *)rank_buffer(ranks, ranks->num_meetings - 1);
    const int64_t rows = num_rows_of(step, (int)job->rows), end = (chunk + 1) * ROWS_PER_CHUNK;
    for (int64_t row = chunk * ROWS_PER_CHUNK; row < end && row < rows; row++) {
        add_row(buffer + row * ranks->size * job->width, job->y + row * job->width, job->width, ranks->size, job->keeps);
    }
}

const Kernel hw_add_ranks = {.num_chunks = add_ranks_chunks, .run_chunk = add_ranks_chunk};
