/* Batch norm and the block epilogue in few passes over memory, for the CPU: kernels/batch_normalization.py calls them. */

#include "bf16.h"

#include <omp.h>

enum { BLOCK_ROWS = 64 };

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
