// Checks of what a kernel touches, and the shared memory of a block.
#include <stdlib.h>
#include <string.h>

#include "runtime.h"

enum { POISON = 0xA5, SHARED_ALIGNMENT = 128, REDZONE_BYTES = 128 };

static const char *const KINDS[] = {"load", "store", "atomic"};

static bool inside(uint64_t address, uint64_t size, uint64_t low, uint64_t bytes) {
    return address - low < bytes && bytes - (address - low) >= size;
}

// The last range that begins at or below the address, or -1.
static int64_t range_below(const RunSpec *spec, uint64_t address) {
    int64_t low = 0, high = spec->n_ranges;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (spec->lows[middle] <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low - 1;
}

static bool in_shared(const Block *block, uint64_t address, uint64_t size) {
    for (int i = 0; i < block->n_shared; i++)
        if (inside(address, size, block->shared[i].low, block->shared[i].bytes))
            return true;
    return false;
}

static void fail_shared(const SharedArray *array, uint64_t address, uint64_t size,
                        const char *kind) {
    uint64_t high = array->low + array->bytes;
    bool before = address < array->low;
    uint64_t distance = before ? array->low - address : address + size - high;
    fail(-1, "out of bounds: %llu-byte %s reaches %llu bytes %s a shared array of %llu bytes",
         (unsigned long long)size, kind, (unsigned long long)distance,
         before ? "before" : "past the end of", (unsigned long long)array->bytes);
}

static void fail_range(const RunSpec *spec, uint64_t address, uint64_t size,
                       const char *kind) {
    int64_t below = range_below(spec, address), nearest = below;
    uint64_t past = ~0ull, before = ~0ull;
    if (below >= 0) past = address + size - spec->highs[below];
    if (below + 1 < spec->n_ranges) before = spec->lows[below + 1] - address;
    if (before < past) nearest = below + 1;
    fail(nearest, "out of bounds: %llu-byte %s at %#llx reaches %llu bytes %s",
         (unsigned long long)size, kind, (unsigned long long)address,
         (unsigned long long)(before < past ? before : past),
         nearest < 0 ? "from no memory at all" : before < past ? "before" : "past the end of");
}

static void fail_out_of_bounds(Worker *worker, uint64_t address, uint64_t size,
                               const char *kind) {
    const Block *block = worker->current->warp->block;
    for (int i = 0; i < block->n_shared; i++) {
        const SharedArray *array = &block->shared[i];
        uint64_t low = array->low - REDZONE_BYTES;
        if (address - low < array->bytes + 2 * REDZONE_BYTES)
            fail_shared(array, address, size, kind);
    }
    fail_range(run_spec(worker), address, size, kind);
}

static void find_range(Worker *worker, uint64_t address, uint64_t size, const char *kind) {
    const RunSpec *spec = run_spec(worker);
    if (in_shared(worker->current->warp->block, address, size)) return;
    int64_t i = range_below(spec, address);
    if (i < 0 || !inside(address, size, spec->lows[i], spec->highs[i] - spec->lows[i]))
        fail_out_of_bounds(worker, address, size, kind);
    worker->range_low = spec->lows[i];
    worker->range_bytes = spec->highs[i] - spec->lows[i];
}

bool in_device_memory(const Worker *worker, uint64_t address) {
    const Fiber *fiber = worker->current;
    return !on_stack_of(fiber, address) && !in_shared(fiber->warp->block, address, 1);
}

// Called before each access. `what` is its size, its alignment and its kind, 8 bits each.
void nv_access(uint64_t address, uint32_t what) {
    Worker *worker = this_worker;
    uint64_t size = what & 0xFF, alignment = what >> 8 & 0xFF;
    if (!inside(address, size, worker->range_low, worker->range_bytes)) {
        if (on_stack_of(worker->current, address)) return;
        find_range(worker, address, size, KINDS[what >> 16]);
    }
    if (address & (alignment - 1))
        fail(-1, "misaligned: %llu-byte %s at %#llx, which is no multiple of %llu",
             (unsigned long long)size, KINDS[what >> 16], (unsigned long long)address,
             (unsigned long long)alignment);
    preemption_point(worker);
}

// Called before a copy or fill of many bytes, which the compiler made of a loop.
void nv_access_many(uint64_t address, uint64_t size, uint32_t kind) {
    Worker *worker = this_worker;
    if (!size || on_stack_of(worker->current, address)) return;
    if (!inside(address, size, worker->range_low, worker->range_bytes))
        find_range(worker, address, size, KINDS[kind]);
    if (worker->run->weak && in_device_memory(worker, address))
        fail(-1, "weak memory: a copy or fill of %llu bytes has no model",
             (unsigned long long)size);
    preemption_point(worker);
}

// Called before a division that the CPU would trap on and a GPU would not.
void nv_divide(int64_t dividend, int64_t divisor, uint32_t signed_bits) {
    if (divisor == 0) fail(-1, "division by zero");
    if (signed_bits && divisor == -1 && dividend == INT64_MIN >> (64 - signed_bits))
        fail(-1, "division overflows: the smallest integer by -1");
}

static uint64_t new_shared(int32_t id, uint64_t bytes, Block *block) {
    if (block->n_shared == SHARED_ARRAYS)
        fail(-1, "more than %d shared arrays", SHARED_ARRAYS);
    uint64_t whole = (bytes + SHARED_ALIGNMENT - 1) / SHARED_ALIGNMENT * SHARED_ALIGNMENT;
    SharedArray *array = &block->shared[block->n_shared++];
    array->id = id;
    array->bytes = bytes;
    array->memory = aligned_alloc(SHARED_ALIGNMENT, whole + 2 * REDZONE_BYTES);
    array->low = (uint64_t)array->memory + REDZONE_BYTES;
    memset(array->memory, POISON, whole + 2 * REDZONE_BYTES);
    return array->low;
}

// Returns the block's shared array of this number. Those of size 0 are the dynamic one,
// which all of them alias.
uint64_t nv_shared(int32_t id, uint64_t bytes) {
    Block *block = this_worker->current->warp->block;
    if (bytes == 0) {
        id = -1;
        bytes = block->job->spec->shared_bytes;
    }
    for (int i = 0; i < block->n_shared; i++)
        if (block->shared[i].id == id) return block->shared[i].low;
    return new_shared(id, bytes, block);
}

void free_shared(Block *block) {
    for (int i = 0; i < block->n_shared; i++) free(block->shared[i].memory);
}
