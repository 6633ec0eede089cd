/* Batch norm and the block epilogue in few passes over memory, for the CPU: kernels/batch_normalization.py calls them. */

#include <omp.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK_ROWS = 64 };

/* No two arrays of a pass overlap. */
#define EACH_CHANNEL _Pragma("omp simd") for (int64_t c = 0; c < channels; c++)

static inline float from_bf16(uint16_t value) {
    const uint32_t bits = (uint32_t)value << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* To the nearest, ties to even; NaN stays NaN. */
static inline uint16_t to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? (uint16_t)(bits >> 16 | 0x40) : (uint16_t)rounded;
}

/* scratch: (threads, 2, channels). */
static void add_up(const float *restrict scratch, int64_t threads, int64_t channels, float *restrict first,
                   float *restrict second) {
    memset(first, 0, channels * sizeof(float));
    memset(second, 0, channels * sizeof(float));
    for (int t = 0; t < threads; t++)
        EACH_CHANNEL {
            first[c] += scratch[(2 * t) * channels + c];
            second[c] += scratch[(2 * t + 1) * channels + c];
        }
}

#define T float
#define LOAD(v) (v)
#define STORE(v) (v)
#define NAME(n) n##_f32
#include "passes.h"
#undef T
#undef LOAD
#undef STORE
#undef NAME

#define T uint16_t
#define LOAD(v) from_bf16(v)
#define STORE(v) to_bf16(v)
#define NAME(n) n##_bf16
#include "passes.h"
