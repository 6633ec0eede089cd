/* Vectors and tiles for convolutions in bfloat16, on processors with AMX or AVX512_BF16: 16 bits to and from float, and
 * products of blocks of (32, depth) x (depth, 32).
 *
 * Maps are channels_last bfloat16: (rows, channels), a row a pixel of an image. All sums are in float.
 */

#pragma once

#include "bf16.h"

#include <immintrin.h>
#include <omp.h>
#include <stdlib.h>

enum {
    SIDE = 32,        /* rows, columns and depth of a block of a product: two tiles of 16 each way, one of depth 32 */
    TILE = 512,       /* bf16 in a tile of 16 rows of 32 */
    BLOCK_ROWS = 128, /* rows that share one sweep over the weights */
    MOST_TAPS = 9,
    PASS_ROWS = 8,    /* rows of which a pass over maps takes 32 channels at a time, while it fetches the next */
};

#define ROUND_UP(n, m) (((n) + (m)-1) / (m) * (m))

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* --- memory of a thread, kept for the next call -------------------------------------------------------------------- */

enum { INPUT, GRADIENT, LEFT, TRANSPOSED, PANEL, WEIGHT, COMMON, SLOTS };
static _Thread_local struct {
    void *memory;
    int64_t size;
} slots[SLOTS];

static inline void *scratch(int slot, int64_t size) {
    if (slots[slot].size < size) {
        free(slots[slot].memory);
        slots[slot].size = ROUND_UP(size, 4096);
        slots[slot].memory = aligned_alloc(4096, slots[slot].size);
        if (!slots[slot].memory) abort(); /* as PyTorch's own kernels end where memory does */
    }
    return slots[slot].memory;
}

/* `count` zeros; what is not written later, borders and padding, stays so. */
static inline bf16 *zeros(int slot, int64_t count) {
    return memset(scratch(slot, count * sizeof(bf16)), 0, count * sizeof(bf16));
}

/* --- vectors of 16 and 32 ------------------------------------------------------------------------------------------ */

static inline __mmask16 mask16(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }
static inline __mmask32 mask32(int64_t n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0 : (1u << n) - 1; }

static inline __m512 widened(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

typedef struct {
    __m512 low, high;
} pair;

static inline pair load32(const bf16 *p, __mmask32 mask) {
    const __m512i v = _mm512_maskz_loadu_epi16(mask, p);
    return (pair){widened(_mm512_castsi512_si256(v)), widened(_mm512_extracti64x4_epi64(v, 1))};
}

static inline __m512i rounded(pair v) { return (__m512i)_mm512_cvtne2ps_pbh(v.high, v.low); }

static inline pair floats32(const float *p, int64_t n) {
    return (pair){_mm512_maskz_loadu_ps(mask16(n), p), _mm512_maskz_loadu_ps(mask16(n - 16), p + 16)};
}

static inline void put32(float *p, int64_t n, pair v) {
    _mm512_mask_storeu_ps(p, mask16(n), v.low);
    _mm512_mask_storeu_ps(p + 16, mask16(n - 16), v.high);
}

/* To memory, past the cache where they fill lines of it: maps and gradients are too large to be found there by whoever
 * reads them, and to write a line in the cache is to read it first. See `streamed`. */
static inline void stream32(bf16 *p, int64_t n, __m512i v) {
    if (n >= 32 && (uintptr_t)p % 64 == 0)
        _mm512_stream_si512((__m512i *)p, v);
    else
        _mm512_mask_storeu_epi16(p, mask32(n), v);
}

static inline void stream16(float *p, int64_t n, __m512 v) {
    if (n >= 16 && (uintptr_t)p % 64 == 0)
        _mm512_stream_ps(p, v);
    else
        _mm512_mask_storeu_ps(p, mask16(n), v);
}

/* Before other threads read what this one has streamed. */
static inline void streamed(void) { _mm_sfence(); }

/* NaN stays NaN: the maximum is its second operand then. */
static inline __m512 relu(__m512 v) { return _mm512_max_ps(_mm512_setzero_ps(), v); }

/* Where relu's gradient is 1: where NaN is, too. */
static inline __mmask16 passes(__m512 v) { return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NLE_UQ); }

/* Two rows of 32 as pairs: of the first 16 columns, or of the others. */
static inline __m512i pairs(__m512i a, __m512i b, int half) {
    static const bf16 order[64] __attribute__((aligned(64))) = {
        0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
        11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
        22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    return _mm512_permutex2var_epi16(a, _mm512_load_si512(order + 32 * half), b);
}

/* (16, 16) of 32 bits. */
static inline void transpose(const __m512i *v, bf16 *tile) {
    __m512i a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
    /* b[4 i + j] has column 4 l + j of rows 4 i ... 4 i + 3 in lane l. */
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512i w = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88), x = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
        const __m512i y = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd), z = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
        _mm512_store_si512(tile + 32 * j, _mm512_shuffle_i32x4(w, x, 0x88));
        _mm512_store_si512(tile + 32 * (8 + j), _mm512_shuffle_i32x4(w, x, 0xdd));
        _mm512_store_si512(tile + 32 * (4 + j), _mm512_shuffle_i32x4(y, z, 0x88));
        _mm512_store_si512(tile + 32 * (12 + j), _mm512_shuffle_i32x4(y, z, 0xdd));
    }
}

/* --- products ------------------------------------------------------------------------------------------------------ */

#ifdef __AMX_BF16__
typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} tile_config;

static const tile_config eight_tiles = {
    .palette = 1, .bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};

static inline void tiles_begin(void) { _tile_loadconfig(&eight_tiles); }
static inline void tiles_end(void) { _tile_release(); }

#else
static inline void tiles_begin(void) {}
static inline void tiles_end(void) {}
#endif

/* Without AMX: sum (8, 2 x 16) += rows (8, 32) times tiles l and r. */
#define ADD_PRODUCTS(ROWS, STRIDE, L, R)                                                   \
    for (int p = 0; p < 16; p++) {                                                          \
        const __m512bh both = (__m512bh)_mm512_loadu_si512((L) + 32 * p);                   \
        const __m512bh more = (__m512bh)_mm512_loadu_si512((R) + 32 * p);                   \
        _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++) {                               \
            int32_t two;                                                                    \
            memcpy(&two, (ROWS) + i * (STRIDE) + 2 * p, 4);                                 \
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], (__m512bh)_mm512_set1_epi32(two), both); \
            sum[i][1] = _mm512_dpbf16_ps(sum[i][1], (__m512bh)_mm512_set1_epi32(two), more); \
        }                                                                                   \
    }

/* The left side of a block: for each tap the first of 16 rows, and of 16 more; `stride` from row to row, and `step` to
 * the next 32 of the depth, in elements. */
typedef struct {
    const bf16 *upper[MOST_TAPS], *lower[MOST_TAPS];
    int64_t stride, step;
} left_side;

/* c (32, 32) = the sum over taps and their depth, `deep` steps of 32. left, right: tiles of 16 columns each. */
static inline void multiply(const left_side *a, int64_t taps, const int32_t *tap, int64_t deep, const bf16 *left,
                            const bf16 *right, float *c) {
#ifdef __AMX_BF16__
    __asm__ volatile("" ::: "memory"); /* compilers do not know what a tile load reads */
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t t = 0; t < taps; t++) {
        const bf16 *upper = a->upper[t], *lower = a->lower[t];
        const bf16 *l = left + tap[t] * deep * TILE, *r = right + tap[t] * deep * TILE;
        for (int64_t k = 0; k < deep; k++) {
            _tile_loadd(4, upper + k * a->step, 2 * a->stride);
            _tile_loadd(6, l + k * TILE, 64);
            _tile_loadd(7, r + k * TILE, 64);
            _tile_loadd(5, lower + k * a->step, 2 * a->stride);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, 128);
    _tile_stored(1, c + 16, 128);
    _tile_stored(2, c + 16 * SIDE, 128);
    _tile_stored(3, c + 16 * SIDE + 16, 128);
#else
    for (int part = 0; part < 4; part++) { /* eight rows at a time */
        __m512 sum[8][2];
        for (int i = 0; i < 8; i++) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
        for (int64_t t = 0; t < taps; t++) {
            const bf16 *rows = (part < 2 ? a->upper[t] : a->lower[t]) + part % 2 * 8 * a->stride;
            const bf16 *l = left + tap[t] * deep * TILE, *r = right + tap[t] * deep * TILE;
            for (int64_t k = 0; k < deep; k++) {
                ADD_PRODUCTS(rows + k * a->step, a->stride, l + k * TILE, r + k * TILE)
            }
        }
        for (int i = 0; i < 8; i++) {
            _mm512_store_ps(c + (8 * part + i) * SIDE, sum[i][0]);
            _mm512_store_ps(c + (8 * part + i) * SIDE + 16, sum[i][1]);
        }
    }
#endif
}

/* c = or += a b over `steps` tiles of depth 32. c: four tiles of (16, 16), the second beside the first. */
static inline void accumulate(const bf16 *upper, const bf16 *lower, const bf16 *left, const bf16 *right, int64_t steps,
                              float *c, int add) {
#ifdef __AMX_BF16__
    __asm__ volatile("" ::: "memory");
    if (add) {
        _tile_loadd(0, c, 64);
        _tile_loadd(1, c + 256, 64);
        _tile_loadd(2, c + 512, 64);
        _tile_loadd(3, c + 768, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < steps; k++) {
        _tile_loadd(4, upper + k * TILE, 64);
        _tile_loadd(6, left + k * TILE, 64);
        _tile_loadd(7, right + k * TILE, 64);
        _tile_loadd(5, lower + k * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 64);
    _tile_stored(1, c + 256, 64);
    _tile_stored(2, c + 512, 64);
    _tile_stored(3, c + 768, 64);
#else
    for (int part = 0; part < 4; part++) {
        float *at = c + part / 2 * 512 + part % 2 * 8 * 16;
        __m512 sum[8][2];
        for (int i = 0; i < 8; i++)
            for (int j = 0; j < 2; j++)
                sum[i][j] = add ? _mm512_load_ps(at + i * 16 + j * 256) : _mm512_setzero_ps();
        for (int64_t k = 0; k < steps; k++) {
            ADD_PRODUCTS((part < 2 ? upper : lower) + k * TILE + part % 2 * 8 * 32, 32, left + k * TILE, right + k * TILE)
        }
        for (int i = 0; i < 8; i++)
            for (int j = 0; j < 2; j++) _mm512_store_ps(at + i * 16 + j * 256, sum[i][j]);
    }
#endif
}

