/* Elements in bfloat16, one at a time: compilers make vectors of them. */

#pragma once

#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

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
