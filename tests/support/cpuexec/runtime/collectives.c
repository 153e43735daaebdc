// Where lanes of a warp, and threads of a block, wait for each other.
//
// Lanes meet by their mask: a collective is complete when each lane of the mask has come
// with the same operation, from the same call. The last one to come computes the results
// of all and goes on.
#include <stdio.h>
#include <string.h>

#include "runtime.h"

enum { VOTE, SHUFFLE, MATCH_ANY, MATCH_ALL, SYNC_WARP };
enum { VOTE_ALL, VOTE_ANY, VOTE_UNIFORM, BALLOT };
enum { SHUFFLE_INDEX, SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_XOR };
enum { BARRIER, BARRIER_COUNT, BARRIER_AND, BARRIER_OR };

static const char *const NAMES[] = {"vote", "shuffle", "match_any", "match_all",
                                    "syncwarp"};
static const char *const BARRIERS[] = {"syncthreads", "syncthreads_count",
                                       "syncthreads_and", "syncthreads_or"};

static bool has(uint32_t mask, uint32_t lane) { return mask >> lane & 1; }

static uint64_t vote(const Meeting *meeting, uint32_t lane) {
    uint32_t yes = 0;
    for (uint32_t i = 0; i < WARP_LANES; i++)
        if (has(meeting->mask, i) && meeting->values[i]) yes |= 1u << i;
    switch (meeting->extras[lane]) {
        case VOTE_ALL: return yes == meeting->mask;
        case VOTE_ANY: return yes != 0;
        case VOTE_UNIFORM: return yes == meeting->mask || yes == 0;
        default: return yes;
    }
}

// The lane that `lane` reads from, as the PTX manual describes shfl.sync; sets *valid.
static uint32_t source_lane(uint32_t lane, uint32_t extra, bool *valid) {
    uint32_t mode = extra & 3, b = extra >> 8 & 31, clamp = extra >> 16 & 31;
    uint32_t segment = extra >> 24 & 31;
    uint32_t last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    int32_t source;
    switch (mode) {
        case SHUFFLE_UP: source = (int32_t)(lane - b); break;
        case SHUFFLE_DOWN: source = (int32_t)(lane + b); break;
        case SHUFFLE_XOR: source = (int32_t)(lane ^ b); break;
        default: source = (int32_t)(first | (b & ~segment));
    }
    *valid = mode == SHUFFLE_UP ? source >= (int32_t)last : source <= (int32_t)last;
    return *valid ? (uint32_t)source : lane;
}

static uint64_t shuffle(const Meeting *meeting, uint32_t lane) {
    bool valid;
    uint32_t source = source_lane(lane, meeting->extras[lane], &valid);
    if (!has(meeting->mask, source))
        fail(-1, "shuffle: lane %u reads lane %u, which is not in mask %#x", lane, source,
             meeting->mask);
    return (meeting->values[source] & 0xFFFFFFFFu) | (uint64_t)valid << 32;
}

static uint64_t match(const Meeting *meeting, uint32_t lane) {
    uint32_t same = 0;
    for (uint32_t i = 0; i < WARP_LANES; i++)
        if (has(meeting->mask, i) && meeting->values[i] == meeting->values[lane])
            same |= 1u << i;
    if (meeting->operation == MATCH_ANY) return same;
    return same == meeting->mask ? same | 1ull << 32 : 0;
}

static void hand_out(const Meeting *meeting, Warp *warp) {
    for (uint32_t lane = 0; lane < WARP_LANES; lane++) {
        if (!has(meeting->mask, lane)) continue;
        uint64_t *result = &warp->lanes[lane].result;
        switch (meeting->operation) {
            case VOTE: *result = vote(meeting, lane); break;
            case SHUFFLE: *result = shuffle(meeting, lane); break;
            case MATCH_ANY:
            case MATCH_ALL: *result = match(meeting, lane); break;
            default: *result = 0;
        }
    }
}

// A ballot of a warp is the commonest collective: its lanes all get the same.
static void hand_out_vote(const Meeting *meeting, Warp *warp) {
    uint64_t result = vote(meeting, (uint32_t)__builtin_ctz(meeting->mask));
    for (uint32_t lanes = meeting->mask; lanes; lanes &= lanes - 1)
        warp->lanes[__builtin_ctz(lanes)].result = result;
}

static Meeting *open_meeting(Warp *warp, int operation, uint32_t mask, const void *site) {
    uint32_t gone = mask & ~warp->alive;
    if (gone)
        fail(-1, "%s: mask %#x names lane %d, which has exited or does not exist",
             NAMES[operation], mask, __builtin_ctz(gone));
    Meeting *meeting = &warp->meetings[warp->n_meetings++];
    meeting->mask = mask;
    meeting->arrived = 0;
    meeting->operation = operation;
    meeting->site = site;
    return meeting;
}

static Meeting *find_meeting(Fiber *fiber, int operation, uint32_t mask, uint32_t extra,
                             const void *site) {
    Warp *warp = fiber->warp;
    if (!has(mask, fiber->lane))
        fail(-1, "%s: the calling lane %u is not in mask %#x", NAMES[operation],
             fiber->lane, mask);
    for (int i = 0; i < warp->n_meetings; i++) {
        Meeting *meeting = &warp->meetings[i];
        const char *other = NAMES[meeting->operation];
        if (meeting->mask != mask) {
            // Whoever waits there may come here next, but not while it waits for this lane.
            if (has(meeting->mask, fiber->lane) && (meeting->arrived & mask))
                fail(-1, "divergence: %s with mask %#x while lanes wait at a %s with mask %#x",
                     NAMES[operation], mask, other, meeting->mask);
            continue;
        }
        if (meeting->operation != operation)
            fail(-1, "divergence: %s while other lanes of mask %#x wait at a %s",
                 NAMES[operation], mask, other);
        if (meeting->site != site && operation != SYNC_WARP)
            fail(-1, "divergence: lanes of mask %#x come to a %s from two places in the code",
                 mask, other);
        if (operation == VOTE && meeting->extras[__builtin_ctz(meeting->arrived)] != extra)
            fail(-1, "divergence: lanes of mask %#x vote in two different ways", mask);
        return meeting;
    }
    return open_meeting(warp, operation, mask, site);
}

static uint64_t meet(int operation, uint32_t mask, uint64_t value, uint32_t extra,
                     const void *site) {
    Worker *worker = this_worker;
    check_stack_depth();
    preemption_point(worker);
    Fiber *fiber = worker->current;
    Warp *warp = fiber->warp;
    Meeting *meeting = find_meeting(fiber, operation, mask, extra, site);
    meeting->values[fiber->lane] = value;
    meeting->extras[fiber->lane] = extra;
    meeting->arrived |= 1u << fiber->lane;
    if (meeting->arrived != mask) {
        wait_for_others(worker);
        return fiber->result;
    }
    if (operation == SYNC_WARP && worker->run->weak)
        hand_view(warp, mask, join_lanes(worker, warp, mask, NULL));
    if (operation == VOTE)
        hand_out_vote(meeting, warp);
    else
        hand_out(meeting, warp);
    Meeting *last = &warp->meetings[--warp->n_meetings];
    if (meeting != last) *meeting = *last;
    make_ready(worker, warp, mask & ~(1u << fiber->lane));
    return fiber->result;
}

uint64_t nv_vote(uint32_t mask, uint32_t mode, uint32_t predicate) {
    return meet(VOTE, mask, predicate, mode, __builtin_return_address(0));
}

// `control` is the c operand of shfl.sync: the clamp, and the segment 8 bits further up.
uint64_t nv_shuffle(uint32_t mask, uint32_t mode, uint32_t value, uint32_t b,
                    uint32_t control) {
    uint32_t extra = mode | (b & 31) << 8 | (control & 0x1F1F) << 16;
    return meet(SHUFFLE, mask, value, extra, __builtin_return_address(0));
}

uint32_t nv_match_any(uint32_t mask, uint64_t value) {
    return (uint32_t)meet(MATCH_ANY, mask, value, 0, __builtin_return_address(0));
}

uint64_t nv_match_all(uint32_t mask, uint64_t value) {
    return meet(MATCH_ALL, mask, value, 0, __builtin_return_address(0));
}

void nv_sync_warp(uint32_t mask) { meet(SYNC_WARP, mask, 0, 0, NULL); }

static void join_block(Worker *worker, Block *block) {
    View *view = NULL;
    for (int i = 0; i < block->n_warps; i++)
        view = join_lanes(worker, &block->warps[i], block->warps[i].at_barrier, view);
    for (int i = 0; i < block->n_warps; i++)
        hand_view(&block->warps[i], block->warps[i].at_barrier, view);
}

// Lets everyone at the barrier go on once all threads that have not exited are there.
static void open_barrier(Worker *worker, Block *block) {
    if (!block->n_at_barrier || block->n_at_barrier != block->n_live) return;
    uint64_t count = 0, result = 0;
    for (int i = 0; i < block->n_warps; i++)
        for (uint32_t at = block->warps[i].at_barrier; at; at &= at - 1)
            count += block->warps[i].lanes[__builtin_ctz(at)].predicate != 0;
    switch (block->barrier_operation) {
        case BARRIER_COUNT: result = count; break;
        case BARRIER_AND: result = count == (uint64_t)block->n_at_barrier; break;
        case BARRIER_OR: result = count != 0; break;
    }
    if (worker->run->weak) join_block(worker, block);
    block->n_at_barrier = 0;
    for (int i = 0; i < block->n_warps; i++) {
        Warp *warp = &block->warps[i];
        for (uint32_t at = warp->at_barrier; at; at &= at - 1)
            warp->lanes[__builtin_ctz(at)].result = result;
        make_ready(worker, warp, warp->at_barrier);
        warp->at_barrier = 0;
    }
}

static uint32_t wait_at_barrier(int operation, uint32_t predicate) {
    Worker *worker = this_worker;
    check_stack_depth();
    preemption_point(worker);
    Fiber *fiber = worker->current;
    Block *block = fiber->warp->block;
    if (block->n_at_barrier && block->barrier_operation != operation)
        fail(-1, "divergence: %s while other threads wait at %s", BARRIERS[operation],
             BARRIERS[block->barrier_operation]);
    block->barrier_operation = operation;
    block->n_at_barrier++;
    fiber->predicate = predicate;
    fiber->warp->at_barrier |= 1u << fiber->lane;
    fiber->state = WAITING;
    open_barrier(worker, block);
    give_way(worker);
    return (uint32_t)fiber->result;
}

void nv_barrier(void) { wait_at_barrier(BARRIER, 0); }

uint32_t nv_barrier_reduce(uint32_t operation, uint32_t predicate) {
    return wait_at_barrier((int)operation, predicate);
}

void leave_block(Worker *worker, Fiber *fiber) {
    Warp *warp = fiber->warp;
    for (int i = 0; i < warp->n_meetings; i++)
        if (has(warp->meetings[i].mask, fiber->lane))
            fail(-1, "lane %u exits while lanes wait for it at a %s with mask %#x",
                 fiber->lane, NAMES[warp->meetings[i].operation], warp->meetings[i].mask);
    warp->alive &= ~(1u << fiber->lane);
    warp->block->n_live--;
    open_barrier(worker, warp->block);
}

void describe_wait(const Fiber *fiber, char *text, size_t bytes) {
    const Warp *warp = fiber->warp;
    const Block *block = warp->block;
    if (has(warp->at_barrier, fiber->lane)) {
        snprintf(text, bytes, "%s, where %d of %d threads are",
                 BARRIERS[block->barrier_operation], block->n_at_barrier, block->n_live);
        return;
    }
    for (int i = 0; i < warp->n_meetings; i++) {
        const Meeting *meeting = &warp->meetings[i];
        if (!has(meeting->arrived, fiber->lane)) continue;
        snprintf(text, bytes, "a %s with mask %#x, where lanes %#x are missing",
                 NAMES[meeting->operation], meeting->mask,
                 meeting->mask & ~meeting->arrived);
        return;
    }
    snprintf(text, bytes, "nothing known");
}
