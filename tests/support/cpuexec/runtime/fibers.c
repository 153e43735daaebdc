// Stacks of fibers, and the switch between them.
//
// A stack is STACK_BYTES above a page that nobody may touch. Stacks are kept in a pool for
// the whole process and linked through their own topmost words while nobody uses them.
#define _GNU_SOURCE
#include <pthread.h>
#include <sys/mman.h>

#include "runtime.h"

#if !defined(__x86_64__) || !defined(__linux__)
#error "fibers are switched in x86-64 assembly for Linux"
#endif

enum {
    GUARD_BYTES = 4096,
    STACK_BYTES = 65536,
    // Left to the runtime itself, which runs on the fiber's stack.
    RESERVE_BYTES = 16384,
    STACKS_PER_SLAB = 64,
    // Lanes run the same code at the same depth: without this their frames would all
    // fall into the same few sets of the CPU's cache.
    STAGGER_BYTES = 320,
};

typedef struct Free {
    struct Free *following;
} Free;

static pthread_mutex_t pool_lock = PTHREAD_MUTEX_INITIALIZER;
static Free *pool;  // guarded by pool_lock

// The lowest address that the running fiber's kernel may reach with its stack pointer.
__thread uint64_t stack_limit __attribute__((tls_model("initial-exec"), used));

static Free *link_of(uint64_t stack) {
    return (Free *)(stack + STACK_BYTES - sizeof(Free));
}

static bool grow_pool(void) {
    size_t each = GUARD_BYTES + STACK_BYTES;
    char *slab = mmap(NULL, each * STACKS_PER_SLAB, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (slab == MAP_FAILED) return false;
    for (int i = 0; i < STACKS_PER_SLAB; i++) {
        // A process may have only so many guards; the probe of each frame does without.
        (void)!mprotect(slab + each * i, GUARD_BYTES, PROT_NONE);
        Free *link = link_of((uint64_t)(slab + each * i + GUARD_BYTES));
        link->following = pool;
        pool = link;
    }
    return true;
}

bool give_stacks(Fiber *fibers, int n) {
    bool enough = true;
    pthread_mutex_lock(&pool_lock);
    int given = 0;
    while (given < n && enough) {
        if (pool) {
            fibers[given++].stack = (uint64_t)pool + sizeof(Free) - STACK_BYTES;
            pool = pool->following;
        } else {
            enough = grow_pool();
        }
    }
    pthread_mutex_unlock(&pool_lock);
    if (!enough) take_stacks_back(fibers, given);
    return enough;
}

void take_stacks_back(Fiber *fibers, int n) {
    pthread_mutex_lock(&pool_lock);
    for (int i = n - 1; i >= 0; i--) {
        Free *link = link_of(fibers[i].stack);
        link->following = pool;
        pool = link;
    }
    pthread_mutex_unlock(&pool_lock);
}

void switch_stacks(void **saved, void *next);

// Saves what a function must keep for its caller, then continues where `next` was saved.
__asm__(
    ".text\n"
    ".globl switch_stacks\n"
    ".hidden switch_stacks\n"
    ".type switch_stacks, @function\n"
    "switch_stacks:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size switch_stacks, .-switch_stacks\n");

// Called by each compiled function that has a frame, before it takes it: %rax bytes are
// wanted. All registers are kept.
__asm__(
    ".text\n"
    ".globl nv_probe_stack\n"
    ".type nv_probe_stack, @function\n"
    "nv_probe_stack:\n"
    "  pushq %rcx\n"
    "  pushq %rdx\n"
    "  movq stack_limit@gottpoff(%rip), %rcx\n"
    "  leaq 16(%rsp), %rdx\n"
    "  subq %rax, %rdx\n"
    "  jb 1f\n"
    "  cmpq %fs:(%rcx), %rdx\n"
    "  jb 1f\n"
    "  popq %rdx\n"
    "  popq %rcx\n"
    "  ret\n"
    "1: andq $-16, %rsp\n"
    "  call stack_overflow\n"
    "  ud2\n"
    ".size nv_probe_stack, .-nv_probe_stack\n");

__attribute__((used, visibility("hidden"))) void stack_overflow(void) {
    fail(-1, "stack overflow: more than %d bytes of frames and local arrays",
         STACK_BYTES - RESERVE_BYTES);
}

void check_stack_depth(void) {
    if ((uint64_t)__builtin_frame_address(0) < stack_limit) stack_overflow();
}

// Lays out a stack as switch_stacks would have left it just before calling `start`.
void prepare_stack(Fiber *fiber, void (*start)(void)) {
    uint64_t top = fiber->stack + STACK_BYTES - 64 - fiber->lane * STAGGER_BYTES;
    uint64_t *sp = (uint64_t *)(top & ~(uint64_t)15) - 1;
    *sp = 0;  // `start` does not return
    *--sp = (uint64_t)start;
    for (int i = 0; i < 6; i++) *--sp = 0;
    fiber->sp = sp;
}

// Continues a fiber, from the scheduler or straight from another fiber. Most switches are
// of the second kind: the CPU then predicts the returns right, as lanes that wait in the
// same place return through the same callers.
void enter_fiber(Worker *worker, void **saved, Fiber *fiber) {
    worker->current = fiber;
    stack_limit = fiber->stack + RESERVE_BYTES;
    switch_stacks(saved, fiber->sp);
}

void enter_scheduler(Worker *worker, Fiber *fiber) {
    worker->current = NULL;
    switch_stacks(&fiber->sp, worker->sp);
}

bool on_stack_of(const Fiber *fiber, uint64_t address) {
    return address - fiber->stack < STACK_BYTES;
}
