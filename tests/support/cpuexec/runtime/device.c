// What a thread knows of itself, and the functions of libdevice that kernels use.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "runtime.h"

enum { TID, CTAID = 3, NTID = 6, NCTAID = 9, LANE = 12, WARP_SIZE, LANES_BELOW, SHARED };

uint32_t nv_register(uint32_t which) {
    const Fiber *fiber = this_worker->current;
    const Block *block = fiber->warp->block;
    const JobSpec *spec = block->job->spec;
    if (which >= NTID && which < NCTAID) return spec->block[which - NTID];
    if (which >= NCTAID && which < LANE) return spec->grid[which - NCTAID];
    switch (which) {
        case TID: return fiber->x;
        case TID + 1: return fiber->y;
        case TID + 2: return fiber->z;
        case CTAID: return block->x;
        case CTAID + 1: return block->y;
        case CTAID + 2: return block->z;
        case LANE: return fiber->lane;
        case WARP_SIZE: return WARP_LANES;
        case LANES_BELOW: return (1u << fiber->lane) - 1;
        default: return spec->shared_bytes;
    }
}

// All lanes that have not exited: one of the answers that a GPU may give.
uint32_t nv_active_mask(void) { return this_worker->current->warp->alive; }

// The float32 of a float16, as bits. A NaN keeps its payload and becomes quiet.
uint32_t nv_half_to_float(uint32_t half) {
    uint32_t sign = (half & 0x8000) << 16, exponent = half >> 10 & 31, rest = half & 0x3FF;
    if (exponent == 31)
        return sign | 0x7F800000 | (rest ? 0x400000 : 0) | rest << 13;
    if (exponent) return sign | (exponent + 112) << 23 | rest << 13;
    float subnormal = (float)rest * 0x1p-24f;
    uint32_t bits;
    memcpy(&bits, &subnormal, sizeof bits);
    return sign | bits;
}

// The float16 nearest to a float32, ties to even, as bits.
uint32_t nv_float_to_half(uint32_t bits) {
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000)
        return sign | 0x7E00 | (magnitude >> 13 & 0x3FF);
    if (magnitude >= 0x477FF000) return sign | 0x7C00;
    if (magnitude < 0x38800000) {
        float value;
        memcpy(&value, &magnitude, sizeof value);
        return sign | (uint32_t)lrintf(value * 0x1p24f);
    }
    uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
    return sign | ((rounded >> 13) - (112 << 10));
}

int32_t nv_ffs(int32_t x) { return __builtin_ffs(x); }
int32_t nv_ffsll(int64_t x) { return __builtin_ffsll(x); }
int32_t nv_popc(int32_t x) { return __builtin_popcount((uint32_t)x); }
int32_t nv_popcll(int64_t x) { return __builtin_popcountll((uint64_t)x); }
int32_t nv_clz(int32_t x) { return x ? __builtin_clz((uint32_t)x) : 32; }
int32_t nv_clzll(int64_t x) { return x ? __builtin_clzll((uint64_t)x) : 64; }

uint64_t nv_brevll(uint64_t x) {
    x = (x >> 1 & 0x5555555555555555ull) | (x & 0x5555555555555555ull) << 1;
    x = (x >> 2 & 0x3333333333333333ull) | (x & 0x3333333333333333ull) << 2;
    x = (x >> 4 & 0x0F0F0F0F0F0F0F0Full) | (x & 0x0F0F0F0F0F0F0F0Full) << 4;
    return __builtin_bswap64(x);
}

uint32_t nv_brev(uint32_t x) { return (uint32_t)(nv_brevll(x) >> 32); }

int32_t nv_min(int32_t a, int32_t b) { return a < b ? a : b; }
int32_t nv_max(int32_t a, int32_t b) { return a > b ? a : b; }
int64_t nv_llmin(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t nv_llmax(int64_t a, int64_t b) { return a > b ? a : b; }
uint32_t nv_umin(uint32_t a, uint32_t b) { return a < b ? a : b; }
uint32_t nv_umax(uint32_t a, uint32_t b) { return a > b ? a : b; }
uint64_t nv_ullmin(uint64_t a, uint64_t b) { return a < b ? a : b; }
uint64_t nv_ullmax(uint64_t a, uint64_t b) { return a > b ? a : b; }
int32_t nv_abs(int32_t a) { return abs(a); }
int64_t nv_llabs(int64_t a) { return llabs(a); }
int32_t nv_mulhi(int32_t a, int32_t b) { return (int32_t)((int64_t)a * b >> 32); }
uint32_t nv_umulhi(uint32_t a, uint32_t b) { return (uint32_t)((uint64_t)a * b >> 32); }

uint64_t nv_umul64hi(uint64_t a, uint64_t b) {
    return (uint64_t)((unsigned __int128)a * b >> 64);
}

float nv_fminf(float a, float b) { return fminf(a, b); }
float nv_fmaxf(float a, float b) { return fmaxf(a, b); }
float nv_fabsf(float a) { return fabsf(a); }
float nv_sqrtf(float a) { return sqrtf(a); }
float nv_floorf(float a) { return floorf(a); }
float nv_rintf(float a) { return rintf(a); }
float nv_fmaf(float a, float b, float c) { return fmaf(a, b, c); }
double nv_fmin(double a, double b) { return fmin(a, b); }
double nv_fmax(double a, double b) { return fmax(a, b); }
double nv_fabs(double a) { return fabs(a); }
