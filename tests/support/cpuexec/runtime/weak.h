// Weak memory: what a load may return beside the newest value.
#pragma once
#include "runtime.h"

enum {
    VIEW_LEVELS = 5,  // of 4 bits each: a run may store to 2 ** 20 words
    ARENA_BYTES = 1 << 20,
    SCRATCH_BYTES = 128,
};

typedef struct Chunk {
    struct Chunk *following;
    _Alignas(16) unsigned char bytes[ARENA_BYTES];
} Chunk;

typedef struct {
    Chunk *chunk;
    size_t used;  // of the first chunk
} Arena;

// One store to one word: the word's value after it, and what whoever reads it may know.
typedef struct {
    uint32_t time, value;
    View *view;
} Message;

typedef struct {
    uint64_t address;  // of the word; 0 in a free place of the hash table
    uint32_t place;    // in views
    int32_t n, capacity;
    Message *messages;  // by ascending time; the first is what was there before the run
} History;

struct WeakMemory {
    double chance;
    uint32_t time;  // of the last store
    uint64_t n_owners;
    View *fenced;  // by all fences of sequential consistency
    History *table;
    uint32_t n_words, table_mask;
    Arena arena;
    _Alignas(SCRATCH_BYTES) unsigned char scratch[SCRATCH_BYTES];
};

#pragma GCC visibility push(hidden)

// views.c
void *take_bytes(Arena *arena, size_t n);
void free_arena(Arena *arena);
uint32_t time_in(const View *view, uint32_t place);
View *raise_view(Arena *arena, View *view, uint32_t place, uint32_t time, uint64_t owner);
View *join_views(Arena *arena, View *a, View *b);

#pragma GCC visibility pop
