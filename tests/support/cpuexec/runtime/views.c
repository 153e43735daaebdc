// What a lane has seen: for each word the time of its newest store that the lane must not
// go behind.
//
// A view is a tree that never changes once it is shared, so that a lane hands all it has
// seen on by one pointer. Nodes live as long as the run.
#include <stdlib.h>
#include <string.h>

#include "weak.h"

enum { FAN_BITS = 4, FAN = 1 << FAN_BITS, TOP = VIEW_LEVELS - 1 };

struct View {
    uint64_t owner;  // the token of the lane that may still change this node
    union {
        View *parts[FAN];
        uint32_t times[FAN];  // of a leaf, which is no longer than this
    };
};

static size_t node_bytes(int level) {
    return offsetof(View, parts) + FAN * (level ? sizeof(View *) : sizeof(uint32_t));
}

static int digit(uint32_t place, int level) {
    return (int)(place >> (level * FAN_BITS) & (FAN - 1));
}

static View *new_node(Arena *arena, int level) {
    View *node = take_bytes(arena, node_bytes(level));
    memset(node, 0, node_bytes(level));
    return node;
}

void *take_bytes(Arena *arena, size_t n) {
    n = (n + 15) & ~(size_t)15;
    if (!arena->chunk || arena->used + n > ARENA_BYTES) {
        Chunk *chunk = malloc(sizeof *chunk);
        chunk->following = arena->chunk;
        arena->chunk = chunk;
        arena->used = 0;
    }
    arena->used += n;
    return arena->chunk->bytes + arena->used - n;
}

void free_arena(Arena *arena) {
    while (arena->chunk) {
        Chunk *chunk = arena->chunk;
        arena->chunk = chunk->following;
        free(chunk);
    }
}

uint32_t time_in(const View *view, uint32_t place) {
    for (int level = TOP; level && view; level--) view = view->parts[digit(place, level)];
    return view ? view->times[digit(place, 0)] : 0;
}

static View *raise_at(Arena *arena, View *view, uint32_t place, uint32_t time,
                      uint64_t owner, int level) {
    if (!view || view->owner != owner) {
        View *copy = new_node(arena, level);
        if (view) memcpy(copy, view, node_bytes(level));
        copy->owner = owner;
        view = copy;
    }
    int i = digit(place, level);
    if (level)
        view->parts[i] = raise_at(arena, view->parts[i], place, time, owner, level - 1);
    else
        view->times[i] = time;
    return view;
}

// Returns a view that differs in one word's time. Nodes of this owner change in place.
View *raise_view(Arena *arena, View *view, uint32_t place, uint32_t time, uint64_t owner) {
    return raise_at(arena, view, place, time, owner, TOP);
}

static View *join_leaves(Arena *arena, View *a, View *b) {
    uint32_t times[FAN];
    for (int i = 0; i < FAN; i++)
        times[i] = a->times[i] > b->times[i] ? a->times[i] : b->times[i];
    if (!memcmp(times, a->times, sizeof times)) return a;
    if (!memcmp(times, b->times, sizeof times)) return b;
    View *both = new_node(arena, 0);
    memcpy(both->times, times, sizeof times);
    return both;
}

static View *join_at(Arena *arena, View *a, View *b, int level) {
    if (a == b || !b) return a;
    if (!a) return b;
    if (!level) return join_leaves(arena, a, b);
    View *parts[FAN];
    for (int i = 0; i < FAN; i++)
        parts[i] = join_at(arena, a->parts[i], b->parts[i], level - 1);
    if (!memcmp(parts, a->parts, sizeof parts)) return a;
    if (!memcmp(parts, b->parts, sizeof parts)) return b;
    View *both = new_node(arena, level);
    memcpy(both->parts, parts, sizeof parts);
    return both;
}

// Returns what either has seen: one of the two itself, if that covers the other.
View *join_views(Arena *arena, View *a, View *b) { return join_at(arena, a, b, TOP); }
