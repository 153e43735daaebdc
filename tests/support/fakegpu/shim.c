/* A libcuda.so.1 with one function: it hands out what Python has registered.

   Libraries find every function of the driver through cuGetProcAddress. Which function
   there is, and what it does, is decided in driver.py. */

#include <stddef.h>
#include <stdint.h>

typedef void *(*resolver_t)(const char *name, int version);

static resolver_t resolver;

__attribute__((visibility("default"))) void fakegpu_set_resolver(resolver_t found)
{
    resolver = found;
}

__attribute__((visibility("default"))) int cuGetProcAddress_v2(
    const char *name, void **function, int version, uint64_t flags, int *found)
{
    (void)flags;
    *function = resolver ? resolver(name, version) : NULL;
    if (found != NULL)
        *found = *function != NULL ? 0 : 1;
    return *function != NULL ? 0 : 500; /* CUDA_ERROR_NOT_FOUND */
}

__attribute__((visibility("default"))) int cuGetProcAddress(
    const char *name, void **function, int version, uint64_t flags)
{
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
