// Weak memory by views.
//
// Every store leaves a message in the history of its word. A load may return any message
// that its lane is not yet bound to be past, so that stores of one lane become visible to
// another in any order, and late. A message carries a view: what the lane that stored it
// had seen by its last fence, or by now if the store is a release. It binds a reader at
// once if the load is an acquire, else from its next fence on. Barriers join the views of
// those that meet. Memory itself always holds the newest values, which are what atomic
// operations read.
//
// What PTX allows and this leaves out: two lanes' stores to two words that end in opposite
// orders, since the stores of a word are in the order of their execution; loads that
// return a value stored later; differences between the bytes of one word; comparisons that
// fail on an old value. Scopes are taken for the whole GPU's.
#include <stdlib.h>
#include <string.h>

#include "weak.h"

enum { ACQUIRE = 1, RELEASE = 2, COMPARES = 4 };
// Lanes of a warp are late together, as they share caches, and each word has its own way
// of being late. A warp's mood decides, and lasts for some loads.
enum { BY_CHANCE, NEWEST, OLDEST, WAYS_TO_BE_LATE, LOADS_A_MOOD = 128 };
enum { WORD = 4, FIRST_CAPACITY = 4, FIRST_TABLE = 1024 };

// A call's `what`: size, bytes that are loaded as one, and order, 8 bits each.
static uint64_t size_of(uint32_t what) { return what & 0xFF; }
static uint64_t whole_of(uint32_t what) { return what >> 8 & 0xFF; }
static uint32_t order_of(uint32_t what) { return what >> 16; }

static uint64_t word_of(uint64_t address) { return address & ~(uint64_t)(WORD - 1); }

static History *slot_of(const WeakMemory *weak, uint64_t address) {
    uint64_t hash = (address / WORD) * 0x9E3779B97F4A7C15ull;
    uint32_t i = (uint32_t)(hash >> 32) & weak->table_mask;
    while (weak->table[i].address && weak->table[i].address != address)
        i = (i + 1) & weak->table_mask;
    return &weak->table[i];
}

static History *find(const WeakMemory *weak, uint64_t address) {
    History *history = slot_of(weak, address);
    return history->address ? history : NULL;
}

static void grow_table(WeakMemory *weak) {
    History *old = weak->table;
    uint32_t n = weak->table_mask + 1;
    weak->table_mask = 2 * n - 1;
    weak->table = calloc(2 * n, sizeof *old);
    for (uint32_t i = 0; i < n; i++)
        if (old[i].address) *slot_of(weak, old[i].address) = old[i];
    free(old);
}

static void append(WeakMemory *weak, History *history, View *view, uint32_t time) {
    if (history->n == history->capacity) {
        history->capacity = history->capacity ? 2 * history->capacity : FIRST_CAPACITY;
        history->messages = realloc(
            history->messages, (size_t)history->capacity * sizeof *history->messages);
    }
    Message *message = &history->messages[history->n++];
    message->time = time;
    message->view = view;
    memcpy(&message->value, (const void *)history->address, WORD);
    if (time > weak->time) weak->time = time;
}

// Takes down what a word holds, before the first store to it.
static void begin_history(WeakMemory *weak, uint64_t address) {
    History *history = slot_of(weak, address);
    if (history->address) return;
    if (weak->n_words >> (4 * VIEW_LEVELS)) fail(-1, "stores to too many words");
    *history = (History){.address = address, .place = weak->n_words++};
    append(weak, history, NULL, 0);
    if (2 * weak->n_words > weak->table_mask) grow_table(weak);
}

static Message *newest(const History *history) {
    return &history->messages[history->n - 1];
}

// The newest message that is not later than `time`.
static const Message *message_at(const History *history, uint32_t time) {
    const Message *message = newest(history);
    while (message->time > time) message--;
    return message;
}

static void raise(WeakMemory *weak, Seen *seen, const History *history, uint32_t time) {
    if (time <= time_in(seen->now, history->place)) return;
    if (!seen->owner) seen->owner = ++weak->n_owners;
    seen->now = raise_view(&weak->arena, seen->now, history->place, time, seen->owner);
}

static View *share(Seen *seen) {
    seen->owner = 0;
    return seen->now;
}

static void learn(WeakMemory *weak, Seen *seen, View *view, bool acquire) {
    View **where = acquire ? &seen->now : &seen->later;
    *where = join_views(&weak->arena, *where, view);
}

static bool likely(Worker *worker, double chance) {
    return (double)(next_random(worker) >> 11) * 0x1p-53 < chance;
}

// The chance that a load goes back by one store, and then by another one.
static double chance_of(Worker *worker, const History *history, bool again) {
    double chance = worker->run->weak->chance;
    uint64_t *mood = &worker->current->warp->mood;
    if (chance <= 0) return 0;
    if (!*mood || (!again && !draw(worker, LOADS_A_MOOD))) *mood = next_random(worker);
    uint64_t mixed = (*mood ^ history->place) * 0x9E3779B97F4A7C15ull;
    switch ((mixed >> 32) % WAYS_TO_BE_LATE) {
        case NEWEST: return 0;
        case OLDEST: return 1;
        default: return again ? 0.5 : chance;
    }
}

// A time that words of one access are loaded as of, unless their lane is past it: from now
// back by one store or more.
static uint32_t choose_time(Worker *worker, History *const *words, int n) {
    const View *now = worker->current->seen.now;
    uint32_t time = ~0u;
    for (bool again = false;; again = true) {
        const History *last = NULL;
        uint32_t last_time = 0;
        for (int i = 0; i < n; i++) {
            uint32_t at = words[i] ? message_at(words[i], time)->time : 0;
            if (at <= last_time || at <= time_in(now, words[i]->place)) continue;
            last = words[i];
            last_time = at;
        }
        if (!last || !likely(worker, chance_of(worker, last, again))) return time;
        time = last_time - 1;
    }
}

static void load_whole(Worker *worker, uint64_t address, uint64_t size, bool acquire) {
    WeakMemory *weak = worker->run->weak;
    Seen *seen = &worker->current->seen;
    History *words[SCRATCH_BYTES / WORD];
    uint64_t first = word_of(address);
    int n = (int)((word_of(address + size - 1) - first) / WORD) + 1;
    for (int i = 0; i < n; i++) words[i] = find(weak, first + (uint64_t)i * WORD);
    uint32_t chosen = choose_time(worker, words, n);
    for (int i = 0; i < n; i++) {
        if (!words[i]) continue;
        uint32_t least = time_in(seen->now, words[i]->place);
        const Message *message = message_at(words[i], chosen > least ? chosen : least);
        uint64_t offset = (first + (uint64_t)i * WORD) % SCRATCH_BYTES;
        memcpy(weak->scratch + offset, &message->value, WORD);
        raise(weak, seen, words[i], message->time);
        if (message->view) learn(weak, seen, message->view, acquire);
    }
}

static bool any_history(const WeakMemory *weak, uint64_t address, uint64_t size) {
    for (uint64_t at = word_of(address); at < address + size; at += WORD)
        if (find(weak, at)) return true;
    return false;
}

// Returns where the load that follows finds the value that it returns.
void *nv_weak_load(uint64_t address, uint32_t what) {
    Worker *worker = this_worker;
    WeakMemory *weak = worker->run->weak;
    uint64_t size = size_of(what), whole = whole_of(what);
    if (!any_history(weak, address, size)) return (void *)address;
    if (address % SCRATCH_BYTES + size > SCRATCH_BYTES)
        fail(-1, "weak memory: a load of %d bytes has no model", (int)size);
    unsigned char *scratch = weak->scratch + address % SCRATCH_BYTES;
    memcpy(scratch, (const void *)address, size);
    // The elements of a vector are loaded in any order.
    uint64_t n = size / whole, first = n > 1 ? draw(worker, n) : 0;
    for (uint64_t i = 0; i < n; i++)
        load_whole(worker, address + (first + i) % n * whole, whole,
                   order_of(what) & ACQUIRE);
    return scratch;
}

// Called right before a store or an atomic operation.
void nv_weak_begin(uint64_t address, uint32_t what) {
    Worker *worker = this_worker;
    if (!in_device_memory(worker, address)) return;
    for (uint64_t at = word_of(address); at < address + size_of(what); at += WORD)
        begin_history(worker->run->weak, at);
}

static bool covers(uint64_t address, uint64_t size, uint64_t word) {
    return address <= word && word + WORD <= address + size;
}

// Called right after a store.
void nv_weak_store(uint64_t address, uint32_t what) {
    Worker *worker = this_worker;
    WeakMemory *weak = worker->run->weak;
    Seen *seen = &worker->current->seen;
    uint64_t size = size_of(what);
    if (!find(weak, word_of(address))) return;
    uint32_t time = weak->time + 1;
    View *known = order_of(what) & RELEASE ? share(seen) : seen->fenced;
    for (uint64_t at = word_of(address); at < address + size; at += WORD) {
        History *history = find(weak, at);
        View *view = known;
        // The bytes that stay are still those of the message before.
        if (!covers(address, size, at))
            view = join_views(&weak->arena, view, newest(history)->view);
        append(weak, history, view, time);
        raise(weak, seen, history, time);
    }
}

static bool is_unchanged(const WeakMemory *weak, uint64_t address, uint64_t size) {
    for (uint64_t at = address; at < address + size; at += WORD)
        if (memcmp(&newest(find(weak, at))->value, (const void *)at, WORD)) return false;
    return true;
}

// Called right after an atomic operation, which has read the newest messages.
void nv_weak_swap(uint64_t address, uint32_t what) {
    Worker *worker = this_worker;
    WeakMemory *weak = worker->run->weak;
    Seen *seen = &worker->current->seen;
    uint64_t end = address + size_of(what);
    if (!find(weak, address)) return;
    // A comparison that failed has stored nothing.
    bool stored =
        !(order_of(what) & COMPARES) || !is_unchanged(weak, address, size_of(what));
    for (uint64_t at = address; at < end; at += WORD) {
        Message *message = newest(find(weak, at));
        raise(weak, seen, find(weak, at), message->time);
        if (message->view) learn(weak, seen, message->view, order_of(what) & ACQUIRE);
    }
    if (!stored) return;
    uint32_t time = weak->time + 1;
    View *known = order_of(what) & RELEASE ? share(seen) : seen->fenced;
    for (uint64_t at = address; at < end; at += WORD) {
        History *history = find(weak, at);
        // Whoever reads this may rely on what the operation has read, too.
        View *view = join_views(&weak->arena, known, newest(history)->view);
        append(weak, history, view, time);
        raise(weak, seen, history, time);
    }
}

// Called at a fence, of sequential consistency or of acquire and release.
void nv_weak_fence(uint32_t sequential) {
    Worker *worker = this_worker;
    WeakMemory *weak = worker->run->weak;
    Seen *seen = &worker->current->seen;
    seen->now = join_views(&weak->arena, seen->now, seen->later);
    if (sequential) {
        seen->now = join_views(&weak->arena, seen->now, weak->fenced);
        weak->fenced = seen->now;
    }
    seen->fenced = share(seen);
}

// A launch begins with what the one that it comes after has left.
void begin_lane(Fiber *fiber, const Run *run) {
    int32_t after = fiber->warp->block->job->spec->after;
    if (after >= 0) fiber->seen.now = run->jobs[after].left;
}

void end_lane(Worker *worker, Fiber *fiber) {
    Job *job = fiber->warp->block->job;
    job->left = join_views(&worker->run->weak->arena, job->left, share(&fiber->seen));
}

// Returns what a view and some lanes of a warp, who meet at a barrier, have seen together.
View *join_lanes(Worker *worker, Warp *warp, uint32_t lanes, View *view) {
    for (uint32_t left = lanes; left; left &= left - 1) {
        Seen *seen = &warp->lanes[__builtin_ctz(left)].seen;
        view = join_views(&worker->run->weak->arena, view, share(seen));
    }
    return view;
}

void hand_view(Warp *warp, uint32_t lanes, View *view) {
    for (uint32_t left = lanes; left; left &= left - 1)
        warp->lanes[__builtin_ctz(left)].seen.now = view;
}

WeakMemory *new_weak_memory(double chance) {
    WeakMemory *weak = aligned_alloc(SCRATCH_BYTES, sizeof *weak);
    memset(weak, 0, sizeof *weak);
    weak->chance = chance;
    weak->table_mask = FIRST_TABLE - 1;
    weak->table = calloc(FIRST_TABLE, sizeof *weak->table);
    return weak;
}

void free_weak_memory(WeakMemory *weak) {
    for (uint32_t i = 0; i <= weak->table_mask; i++) free(weak->table[i].messages);
    free(weak->table);
    free_arena(&weak->arena);
    free(weak);
}
