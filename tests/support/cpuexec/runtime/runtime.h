// A CUDA thread is a fiber. A worker (OS thread) runs the fibers of its own blocks one at
// a time, so that nothing about a block is ever touched by two OS threads.
#pragma once
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { WARP_LANES = 32, SHARED_ARRAYS = 32, REASON_BYTES = 480 };

typedef struct Block Block;
typedef struct Warp Warp;
typedef struct Worker Worker;
typedef struct View View;
typedef struct WeakMemory WeakMemory;

// Launches as Python passes them. A job starts once the job `after` has finished.
typedef struct {
    void (*entry)(void *arguments);
    void *arguments;
    uint32_t grid[3];
    uint32_t block[3];
    uint32_t shared_bytes;
    int32_t after;
} JobSpec;

typedef struct {
    uint64_t seed;
    double preempt;
    double weak;  // chance of an old value; below 0: kernels are compiled without
    uint64_t max_steps;
    int32_t resident;
    int32_t workers;
    int32_t schedule;
    int32_t n_jobs;
    int64_t n_ranges;
    const uint64_t *lows;  // ascending; the ranges do not overlap
    const uint64_t *highs;
} RunSpec;

typedef struct {
    uint64_t steps;
    int32_t failed;
    int32_t job;    // -1 where no thread is to blame
    int32_t range;  // the allocation that the reason speaks of, or -1
    int32_t thread;
    uint32_t block[3];
    char reason[REASON_BYTES];
} RunResult;

enum { UNIFORM, PRIORITY, ORDERED };

typedef struct {
    const JobSpec *spec;
    int64_t n_blocks, next, finished;
    View *left;  // what its threads had seen when they ended
} Job;

// What a lane is bound to have seen under weak memory.
typedef struct {
    View *now;
    View *later;   // from its next fence on
    View *fenced;  // by its last fence: what its stores carry
    uint64_t owner;  // names the nodes of `now` that nobody else has, if not 0
} Seen;

typedef enum { RUNNABLE, WAITING, FINISHED } State;

typedef struct {
    void *sp;
    uint64_t stack;  // its lowest address; also where its bytes begin for bounds checks
    Warp *warp;
    State state;
    uint32_t lane, thread;
    uint32_t x, y, z;
    uint64_t result;     // of the collective it waited for
    uint32_t predicate;  // what it brought to the block's barrier
    Seen seen;
} Fiber;

// Lanes of one mask that wait for each other. A warp has no two meetings of one mask, and
// no more than it has lanes: each has a lane that waits there and nowhere else.
typedef struct {
    uint32_t mask, arrived;
    int operation;
    const void *site;
    uint64_t values[WARP_LANES];
    uint32_t extras[WARP_LANES];
} Meeting;

struct Warp {
    Block *block;
    Fiber *lanes;
    uint32_t alive, ready, at_barrier;  // masks of lanes
    uint32_t last_lane;
    int64_t place;  // in the worker's list of ready warps, or -1
    int64_t priority;
    uint64_t mood;  // under weak memory: of which words it prefers old values
    int n_meetings;
    Meeting meetings[WARP_LANES];
};

typedef struct {
    uint64_t low, bytes;
    int32_t id;
    void *memory;
} SharedArray;

struct Block {
    Block *previous, *following;  // the worker's live blocks
    Job *job;
    uint32_t x, y, z;
    int32_t n_threads, n_warps, n_live;
    int32_t n_at_barrier, barrier_operation;
    int32_t n_shared;
    SharedArray shared[SHARED_ARRAYS];
    Warp *warps;
    Fiber *fibers;
};

// The lock guards the jobs' counts, the turn and the result. `stopped` is set under it and
// read without.
typedef struct {
    const RunSpec *spec;
    Job *jobs;
    pthread_mutex_t lock;
    RunResult *result;
    WeakMemory *weak;  // NULL if memory is strong; else there is one worker
    int32_t turn;
    volatile int stopped;
} Run;

struct Worker {
    Run *run;
    Fiber *current;
    void *sp;  // of the scheduler, while a fiber runs
    uint64_t random;
    int64_t countdown;  // memory accesses until the running fiber is switched out
    uint64_t range_low, range_bytes;  // the range of the last access
    Warp **ready;
    int64_t n_ready, ready_capacity, cursor;
    Warp *favourite;
    int64_t lowest_priority;
    bool slept;
    Block *blocks;
    Block *ended;  // its last fiber has just finished
    int32_t n_blocks;
    uint64_t steps;
};

// What follows stays inside the library; compiled kernels call the functions named nv_*.
#pragma GCC visibility push(hidden)

extern __thread Worker *this_worker __attribute__((tls_model("initial-exec")));

static inline const RunSpec *run_spec(const Worker *worker) { return worker->run->spec; }

// running.c
void fail_for(Worker *worker, const Fiber *fiber, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
void fail(int64_t range, const char *format, ...) __attribute__((format(printf, 2, 3)));

// scheduler.c
int64_t next_countdown(Worker *worker);
uint64_t next_random(Worker *worker);
Fiber *choose(Worker *worker);
uint64_t draw(Worker *worker, uint64_t bound);
void make_ready(Worker *worker, Warp *warp, uint32_t lanes);
void give_way(Worker *worker);
void wait_for_others(Worker *worker);
void preempt(Worker *worker);

// fibers.c
bool give_stacks(Fiber *fibers, int n);
void take_stacks_back(Fiber *fibers, int n);
void prepare_stack(Fiber *fiber, void (*start)(void));
void enter_fiber(Worker *worker, void **saved, Fiber *fiber);
void enter_scheduler(Worker *worker, Fiber *fiber);
bool on_stack_of(const Fiber *fiber, uint64_t address);
void check_stack_depth(void);

// collectives.c
void leave_block(Worker *worker, Fiber *fiber);
void describe_wait(const Fiber *fiber, char *text, size_t bytes);

// memory.c
bool in_device_memory(const Worker *worker, uint64_t address);
void free_shared(Block *block);

// weak.c
WeakMemory *new_weak_memory(double chance);
void free_weak_memory(WeakMemory *weak);
void begin_lane(Fiber *fiber, const Run *run);
void end_lane(Worker *worker, Fiber *fiber);
View *join_lanes(Worker *worker, Warp *warp, uint32_t lanes, View *view);
void hand_view(Warp *warp, uint32_t lanes, View *view);

#pragma GCC visibility pop

// Switches the running fiber out where its turn ends.
static inline void preemption_point(Worker *worker) {
    if (--worker->countdown <= 0) preempt(worker);
}
