// Which fiber runs next, and the life of blocks, workers and runs.
//
// Everything random comes from the worker's generator, which is seeded by the run: with one
// worker the same seed gives the same interleaving.
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime.h"

enum {
    MOST_WORKERS = 64,
    // Accesses after which a fiber is switched out where preemption is off: a loop that
    // waits for another thread makes progress all the same.
    LONGEST_TURN = 4096,
    // PRIORITY: one preemption in so many gives the running warp a new priority.
    CHANGE_POINTS = 8,
    LOOK_AROUND = 512,
};

struct Run {
    const RunSpec *spec;
    Job *jobs;
    pthread_mutex_t lock;  // guards jobs, turn and result
    RunResult *result;
    int32_t turn;
    volatile int stopped;
};

__thread Worker *this_worker;

const RunSpec *run_spec(const Worker *worker) { return worker->run->spec; }

static uint64_t next_random(Worker *worker) {
    uint64_t x = worker->random;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    worker->random = x;
    return x * 0x2545F4914F6CDD1Dull;
}

uint64_t draw(Worker *worker, uint64_t bound) {
    return ((next_random(worker) >> 32) * bound) >> 32;
}

// The number of accesses to the next preemption, each being one with the same chance.
static int64_t next_countdown(Worker *worker) {
    double preempt = run_spec(worker)->preempt;
    if (preempt <= 0) return LONGEST_TURN;
    if (preempt >= 1) return 1;
    double uniform = ((next_random(worker) >> 11) + 1) * 0x1p-53;
    double accesses = 1 + floor(log(uniform) / log1p(-preempt));
    return accesses < 1e9 ? (int64_t)accesses : 1000000000;
}

// Keeps the first failure of a run, told in the name of `fiber` if there is one.
static void record(Worker *worker, const Fiber *fiber, int64_t range, const char *format,
                   va_list arguments) {
    Run *run = worker->run;
    RunResult *result = run->result;
    pthread_mutex_lock(&run->lock);
    if (!result->failed) {
        vsnprintf(result->reason, sizeof result->reason, format, arguments);
        result->failed = 1;
        result->range = (int32_t)range;
        result->job = -1;
        if (fiber) {
            const Block *block = fiber->warp->block;
            result->job = (int32_t)(block->job - run->jobs);
            result->thread = (int32_t)fiber->thread;
            result->block[0] = block->x;
            result->block[1] = block->y;
            result->block[2] = block->z;
        }
    }
    run->stopped = 1;
    pthread_mutex_unlock(&run->lock);
}

static void fail_for(Worker *worker, const Fiber *fiber, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    record(worker, fiber, -1, format, arguments);
    va_end(arguments);
}

// Does not return to a kernel: its fiber is left for good.
void fail(int64_t range, const char *format, ...) {
    Worker *worker = this_worker;
    va_list arguments;
    va_start(arguments, format);
    record(worker, worker->current, range, format, arguments);
    va_end(arguments);
    wait_for_others(worker);
}

void make_ready(Worker *worker, Warp *warp, uint32_t lanes) {
    warp->ready |= lanes;
    if (warp->place >= 0 || !warp->ready) return;
    if (worker->n_ready == worker->ready_capacity) {
        worker->ready_capacity = 2 * worker->ready_capacity + 64;
        worker->ready =
            realloc(worker->ready, worker->ready_capacity * sizeof *worker->ready);
    }
    warp->place = worker->n_ready;
    worker->ready[worker->n_ready++] = warp;
}

static void drop_from_ready(Worker *worker, Warp *warp) {
    Warp *last = worker->ready[--worker->n_ready];
    worker->ready[warp->place] = last;
    last->place = warp->place;
    warp->place = -1;
}

static uint32_t random_lane(Worker *worker, uint32_t lanes) {
    uint32_t skip = (uint32_t)draw(worker, (uint64_t)__builtin_popcount(lanes));
    while (skip--) lanes &= lanes - 1;
    return (uint32_t)__builtin_ctz(lanes);
}

// ORDERED: the lanes of a warp in turn, then the next warp.
static Warp *warp_in_turn(Worker *worker) {
    if (worker->favourite && worker->favourite->place >= 0 && !worker->slept)
        return worker->favourite;
    worker->cursor = (worker->cursor + 1) % worker->n_ready;
    return worker->ready[worker->cursor];
}

static uint32_t lane_in_turn(const Warp *warp) {
    uint32_t later = warp->ready & ~((2u << warp->last_lane) - 1);
    return (uint32_t)__builtin_ctz(later ? later : warp->ready);
}

static Warp *warp_of_highest_priority(Worker *worker) {
    if (worker->favourite && worker->favourite->place >= 0) return worker->favourite;
    Warp *best = worker->ready[0];
    for (int64_t i = 1; i < worker->n_ready; i++)
        if (worker->ready[i]->priority > best->priority) best = worker->ready[i];
    return best;
}

static Fiber *choose(Worker *worker) {
    Warp *warp;
    uint32_t lane;
    switch (run_spec(worker)->schedule) {
        case ORDERED:
            warp = warp_in_turn(worker);
            lane = lane_in_turn(warp);
            break;
        case PRIORITY:
            warp = warp_of_highest_priority(worker);
            lane = random_lane(worker, warp->ready);
            break;
        default:
            warp = worker->ready[draw(worker, (uint64_t)worker->n_ready)];
            lane = random_lane(worker, warp->ready);
    }
    worker->slept = false;
    worker->favourite = warp;
    warp->last_lane = lane;
    warp->ready &= ~(1u << lane);
    if (!warp->ready) drop_from_ready(worker, warp);
    warp->lanes[lane].state = RUNNABLE;
    return &warp->lanes[lane];
}

static void step_limit_exceeded(Worker *worker, const Fiber *fiber) {
    fail_for(worker, fiber, "step limit of %llu exceeded: a livelock?",
             (unsigned long long)run_spec(worker)->max_steps);
}

// Switches the running fiber out, and in again when it is its turn. A fiber that is still
// RUNNABLE is ready at once; one that is WAITING when somebody makes it so.
void give_way(Worker *worker) {
    Fiber *fiber = worker->current;
    if (fiber->state == RUNNABLE) make_ready(worker, fiber->warp, 1u << fiber->lane);
    if (++worker->steps > run_spec(worker)->max_steps) step_limit_exceeded(worker, fiber);
    // Finished fibers and an empty list are the scheduler's. It also looks from time to
    // time whether another worker's blocks have let a job start.
    bool to_scheduler = worker->steps % LOOK_AROUND == 0 || fiber->state == FINISHED ||
                        !worker->n_ready || worker->run->stopped;
    if (to_scheduler) {
        enter_scheduler(worker, fiber);
        return;
    }
    Fiber *next = choose(worker);
    if (next != fiber) enter_fiber(worker, &fiber->sp, next);
}

void wait_for_others(Worker *worker) {
    worker->current->state = WAITING;
    give_way(worker);
}

void preempt(Worker *worker) {
    check_stack_depth();
    worker->countdown = next_countdown(worker);
    worker->slept = true;
    if (run_spec(worker)->schedule == PRIORITY && !draw(worker, CHANGE_POINTS)) {
        worker->current->warp->priority = (int64_t)(next_random(worker) >> 1);
        worker->favourite = NULL;
    }
    give_way(worker);
}

// Called for `nanosleep`: whoever waits for someone else steps behind everyone.
void nv_yield(void) {
    Worker *worker = this_worker;
    worker->slept = true;
    worker->favourite = NULL;
    worker->current->warp->priority = --worker->lowest_priority;
    give_way(worker);
}

void nv_preempt(void) { preemption_point(this_worker); }

static void fiber_main(void) {
    Worker *worker = this_worker;
    Fiber *fiber = worker->current;
    const JobSpec *spec = fiber->warp->block->job->spec;
    spec->entry(spec->arguments);
    leave_block(worker, fiber);
    fiber->state = FINISHED;
    if (fiber->warp->block->n_live == 0) worker->ended = fiber->warp->block;
    give_way(worker);
    __builtin_trap();
}

static void place_fibers(Worker *worker, Block *block) {
    const uint32_t *size = block->job->spec->block;
    for (int i = 0; i < block->n_warps; i++) {
        Warp *warp = &block->warps[i];
        // The meetings themselves are written before they are read.
        memset(warp, 0, offsetof(Warp, meetings));
        warp->block = block;
        warp->lanes = block->fibers + i * WARP_LANES;
        warp->place = -1;
        warp->last_lane = WARP_LANES - 1;
        warp->priority = (int64_t)(next_random(worker) >> 1);
    }
    for (int i = 0; i < block->n_threads; i++) {
        Fiber *fiber = &block->fibers[i];
        uint32_t thread = (uint32_t)i;
        fiber->warp = &block->warps[i / WARP_LANES];
        fiber->thread = thread;
        fiber->lane = thread % WARP_LANES;
        fiber->x = thread % size[0];
        fiber->y = thread / size[0] % size[1];
        fiber->z = thread / (size[0] * size[1]);
        fiber->state = RUNNABLE;
        fiber->warp->alive |= 1u << fiber->lane;
        prepare_stack(fiber, fiber_main);
    }
    for (int i = 0; i < block->n_warps; i++)
        make_ready(worker, &block->warps[i], block->warps[i].alive);
}

static void start_block(Worker *worker, Job *job, int64_t index) {
    const JobSpec *spec = job->spec;
    int64_t plane = (int64_t)spec->grid[0] * spec->grid[1];
    int n_threads = (int)(spec->block[0] * spec->block[1] * spec->block[2]);
    int n_warps = (n_threads + WARP_LANES - 1) / WARP_LANES;
    Block *block = calloc(1, sizeof *block);
    block->fibers = calloc((size_t)n_threads, sizeof *block->fibers);
    block->warps = malloc((size_t)n_warps * sizeof *block->warps);
    block->job = job;
    block->x = (uint32_t)(index % spec->grid[0]);
    block->y = (uint32_t)(index % plane / spec->grid[0]);
    block->z = (uint32_t)(index / plane);
    block->n_threads = block->n_live = n_threads;
    block->n_warps = n_warps;
    block->following = worker->blocks;
    if (block->following) block->following->previous = block;
    worker->blocks = block;
    worker->n_blocks++;
    if (!give_stacks(block->fibers, n_threads)) {
        block->n_threads = 0;
        fail_for(worker, NULL, "no memory for the stacks of a block of %d threads", n_threads);
        return;
    }
    place_fibers(worker, block);
}

static void end_block(Worker *worker, Block *block) {
    if (block->previous) block->previous->following = block->following;
    if (block->following) block->following->previous = block->previous;
    if (worker->blocks == block) worker->blocks = block->following;
    if (worker->favourite && worker->favourite->block == block) worker->favourite = NULL;
    worker->n_blocks--;
    pthread_mutex_lock(&worker->run->lock);
    block->job->finished++;
    pthread_mutex_unlock(&worker->run->lock);
    take_stacks_back(block->fibers, block->n_threads);
    free_shared(block);
    free(block->fibers);
    free(block->warps);
    free(block);
}

static bool may_start(const Run *run, const Job *job) {
    int32_t after = job->spec->after;
    if (job->next == job->n_blocks) return false;
    return after < 0 || run->jobs[after].finished == run->jobs[after].n_blocks;
}

// Takes the next block of one of the jobs that may start; false if there is none.
static bool next_block(Worker *worker, Job **job, int64_t *index) {
    Run *run = worker->run;
    int32_t n_jobs = run->spec->n_jobs, n_eligible = 0;
    bool ordered = run->spec->schedule == ORDERED;
    pthread_mutex_lock(&run->lock);
    for (int32_t i = 0; i < n_jobs; i++) n_eligible += may_start(run, &run->jobs[i]);
    if (n_eligible) {
        int32_t skip = ordered ? run->turn++ % n_eligible
                               : (int32_t)draw(worker, (uint64_t)n_eligible);
        Job *one = run->jobs;
        while (!may_start(run, one) || skip-- > 0) one++;
        *job = one;
        *index = one->next++;
    }
    pthread_mutex_unlock(&run->lock);
    return n_eligible > 0;
}

static bool all_started(Run *run) {
    bool all = true;
    pthread_mutex_lock(&run->lock);
    for (int32_t i = 0; i < run->spec->n_jobs; i++)
        all = all && run->jobs[i].next == run->jobs[i].n_blocks;
    pthread_mutex_unlock(&run->lock);
    return all;
}

static void fail_by_deadlock(Worker *worker) {
    for (Block *block = worker->blocks; block; block = block->following)
        for (int i = 0; i < block->n_threads; i++)
            if (block->fibers[i].state == WAITING) {
                char wait[200];
                describe_wait(&block->fibers[i], wait, sizeof wait);
                fail_for(worker, &block->fibers[i], "deadlock: waits for ever at %s", wait);
                return;
            }
}

// Runs fibers until one of them has something for the scheduler to do.
static void run_fibers(Worker *worker) {
    enter_fiber(worker, &worker->sp, choose(worker));
    Block *block = worker->ended;
    worker->ended = NULL;
    if (block) end_block(worker, block);
}

static void *work(void *pointer) {
    Worker *worker = pointer;
    Run *run = worker->run;
    Worker *outer = this_worker;
    this_worker = worker;
    worker->countdown = next_countdown(worker);
    while (!run->stopped) {
        Job *job;
        int64_t index;
        while (worker->n_blocks < run->spec->resident && next_block(worker, &job, &index))
            start_block(worker, job, index);
        if (worker->n_ready) {
            run_fibers(worker);
        } else if (worker->n_blocks) {
            fail_by_deadlock(worker);
        } else if (all_started(run)) {
            break;
        } else {
            sched_yield();  // the job that the rest comes after runs in other workers
        }
    }
    while (worker->blocks) end_block(worker, worker->blocks);
    pthread_mutex_lock(&run->lock);
    run->result->steps += worker->steps;
    pthread_mutex_unlock(&run->lock);
    free(worker->ready);
    this_worker = outer;
    return NULL;
}

static void seed_worker(Worker *worker, Run *run, int index) {
    memset(worker, 0, sizeof *worker);
    worker->run = run;
    worker->cursor = -1;
    uint64_t x = run->spec->seed * 0x9E3779B97F4A7C15ull + (uint64_t)(index + 1);
    // A mixer after Steele, Lea and Flood's SplitMix64: close seeds start far apart.
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    worker->random = (x ^ (x >> 31)) | 1;
}

void nv_run(const RunSpec *spec, const JobSpec *specs, RunResult *result) {
    Run run = {.spec = spec, .result = result};
    Worker workers[MOST_WORKERS];
    pthread_t threads[MOST_WORKERS];
    int n_workers = spec->workers < MOST_WORKERS ? spec->workers : MOST_WORKERS;
    run.jobs = calloc((size_t)spec->n_jobs, sizeof *run.jobs);
    for (int32_t i = 0; i < spec->n_jobs; i++) {
        const uint32_t *grid = specs[i].grid;
        run.jobs[i].spec = &specs[i];
        run.jobs[i].n_blocks = (int64_t)grid[0] * grid[1] * grid[2];
    }
    pthread_mutex_init(&run.lock, NULL);
    for (int i = 0; i < n_workers; i++) seed_worker(&workers[i], &run, i);
    for (int i = 1; i < n_workers; i++)
        pthread_create(&threads[i], NULL, work, &workers[i]);
    work(&workers[0]);
    for (int i = 1; i < n_workers; i++) pthread_join(threads[i], NULL);
    pthread_mutex_destroy(&run.lock);
    free(run.jobs);
}
