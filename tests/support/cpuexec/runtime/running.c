// The life of blocks, workers and runs, and how a run fails.
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime.h"

enum { MOST_WORKERS = 64 };

__thread Worker *this_worker;

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

void fail_for(Worker *worker, const Fiber *fiber, const char *format, ...) {
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

static void fiber_main(void) {
    Worker *worker = this_worker;
    Fiber *fiber = worker->current;
    const JobSpec *spec = fiber->warp->block->job->spec;
    spec->entry(spec->arguments);
    if (worker->run->weak) end_lane(worker, fiber);
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
        if (worker->run->weak) begin_lane(fiber, worker->run);
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
    if (spec->weak >= 0) run.weak = new_weak_memory(spec->weak);
    pthread_mutex_init(&run.lock, NULL);
    for (int i = 0; i < n_workers; i++) seed_worker(&workers[i], &run, i);
    for (int i = 1; i < n_workers; i++)
        pthread_create(&threads[i], NULL, work, &workers[i]);
    work(&workers[0]);
    for (int i = 1; i < n_workers; i++) pthread_join(threads[i], NULL);
    pthread_mutex_destroy(&run.lock);
    if (run.weak) free_weak_memory(run.weak);
    free(run.jobs);
}
