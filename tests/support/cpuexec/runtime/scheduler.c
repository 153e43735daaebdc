// Which fiber runs next.
//
// Everything random comes from the worker's generator, which is seeded by the run: with one
// worker the same seed gives the same interleaving.
#include <math.h>
#include <stdlib.h>

#include "runtime.h"

enum {
    // Accesses after which a fiber is switched out where preemption is off: a loop that
    // waits for another thread makes progress all the same.
    LONGEST_TURN = 4096,
    // PRIORITY: one preemption in so many gives the running warp a new priority.
    CHANGE_POINTS = 8,
    LOOK_AROUND = 512,  // switches after which the scheduler has a turn
};

uint64_t next_random(Worker *worker) {
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
int64_t next_countdown(Worker *worker) {
    double preempt = run_spec(worker)->preempt;
    if (preempt <= 0) return LONGEST_TURN;
    if (preempt >= 1) return 1;
    double uniform = ((next_random(worker) >> 11) + 1) * 0x1p-53;
    double accesses = 1 + floor(log(uniform) / log1p(-preempt));
    return accesses < 1e9 ? (int64_t)accesses : 1000000000;
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

Fiber *choose(Worker *worker) {
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

static void exceed_step_limit(Worker *worker, const Fiber *fiber) {
    fail_for(worker, fiber, "step limit of %llu exceeded: a livelock?",
             (unsigned long long)run_spec(worker)->max_steps);
}

// Switches the running fiber out, and in again when it is its turn. A fiber that is still
// RUNNABLE is ready at once; one that is WAITING when somebody makes it so.
void give_way(Worker *worker) {
    Fiber *fiber = worker->current;
    if (fiber->state == RUNNABLE) make_ready(worker, fiber->warp, 1u << fiber->lane);
    if (++worker->steps > run_spec(worker)->max_steps) exceed_step_limit(worker, fiber);
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
