/* A convolution that reads its input through the batch norm and ReLU before it, and takes the statistics of the batch
 * norm after it, while the values are in the cache. So of a chain of convolutions, batch norms and ReLUs only the
 * convolutions' own outputs are ever in memory.
 */

#ifdef __AVX512BF16__

#define _DEFAULT_SOURCE /* syscall */
#include "plan.h"

#include <sys/syscall.h>
#include <unistd.h>

/* Whether the system lets this process use what the functions below were compiled for. */
int64_t convolution_prepare(void) {
#ifdef __AMX_BF16__
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tiles */) == 0;
#else
    return 1;
#endif
}

int64_t convolution_has_tiles(void) {
#ifdef __AMX_BF16__
    return 1;
#else
    return 0;
#endif
}

/* From float (outputs, taps, inputs), which is a channels_last weight, to what products take: tiles (columns / 16, taps,
 * depth / 32) of (16 pairs of depth, 16 columns, 2), padded by zeros. Columns are outputs and depth inputs in `packed`, and
 * the other way round in `back`, which may be NULL. */
void convolution_pack(const float *weight, int64_t outputs, int64_t taps, int64_t inputs, bf16 *packed, bf16 *back,
          int64_t threads) {
    const int64_t o_deep = ROUND_UP(outputs, SIDE) / SIDE, i_deep = ROUND_UP(inputs, SIDE) / SIDE;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for collapse(2) schedule(static) nowait
        for (int64_t o = 0; o < o_deep; o++)
            for (int64_t t = 0; t < taps; t++)
                for (int64_t i = 0; i < i_deep; i++) {
                    const float *at = weight + (o * SIDE * taps + t) * inputs + i * SIDE;
                    __m512i v[SIDE];
                    for (int64_t r = 0; r < SIDE; r++)
                        v[r] = o * SIDE + r < outputs ? rounded(floats32(at + r * taps * inputs, inputs - i * SIDE))
                                                      : _mm512_setzero_si512();
                    for (int64_t half = 0; half < 2; half++) {
                        bf16 tile[TILE] __attribute__((aligned(64)));
                        transpose(v + 16 * half, tile);
                        for (int64_t p = 0; p < TILE; p += 32)
                            stream32(packed + (((2 * o + half) * taps + t) * i_deep + i) * TILE + p, 32,
                                     _mm512_load_si512(tile + p));
                    }
                    if (!back) continue;
                    for (int64_t half = 0; half < 2; half++) {
                        bf16 *tile = back + (((2 * i + half) * taps + t) * o_deep + o) * TILE;
                        for (int64_t p = 0; p < 16; p++) stream32(tile + 32 * p, 32, pairs(v[2 * p], v[2 * p + 1], half));
                    }
                }
        streamed();
    }
}

typedef struct {
    float *mean, *squares; /* of the rows so far, by channel */
    float *sums;           /* (images, channels) or NULL */
} statistics;

/* A block of (rows, 32) results to y and to the statistics of its channels; count rows were seen before. */
static inline void finish_forward(const float *c, int64_t rows, const int64_t *place, const int64_t *image, bf16 *y,
                                  int64_t channels, int64_t column, const statistics *s, int64_t count) {
    const int64_t n = channels - column;
    pair total = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t r = 0; r < rows;) {
        int64_t end = rows;
        if (s->sums)
            for (end = r + 1; end < rows && image[end] == image[r];) end++;
        pair sum = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        const int64_t owner = image[r];
        for (; r < end; r++) {
            const pair v = {_mm512_loadu_ps(c + r * SIDE), _mm512_loadu_ps(c + r * SIDE + 16)};
            sum.low = _mm512_add_ps(sum.low, v.low);
            sum.high = _mm512_add_ps(sum.high, v.high);
            stream32(y + place[r] * channels + column, n, rounded(v));
        }
        total.low = _mm512_add_ps(total.low, sum.low);
        total.high = _mm512_add_ps(total.high, sum.high);
        if (s->sums) {
            float *at = s->sums + owner * channels + column;
            pair old = floats32(at, n);
            put32(at, n, (pair){_mm512_add_ps(old.low, sum.low), _mm512_add_ps(old.high, sum.high)});
        }
    }
    const __m512 inverse = _mm512_set1_ps(1.0f / rows);
    const pair mean = {_mm512_mul_ps(total.low, inverse), _mm512_mul_ps(total.high, inverse)};
    pair squares = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t r = 0; r < rows; r++) {
        const __m512 low = _mm512_sub_ps(_mm512_loadu_ps(c + r * SIDE), mean.low);
        const __m512 high = _mm512_sub_ps(_mm512_loadu_ps(c + r * SIDE + 16), mean.high);
        squares.low = _mm512_fmadd_ps(low, low, squares.low);
        squares.high = _mm512_fmadd_ps(high, high, squares.high);
    }
    /* Chan, Golub & LeVeque's formula: no square of a large mean is subtracted from another. */
    const __m512 share = _mm512_set1_ps((float)rows / (count + rows));
    const __m512 weight = _mm512_set1_ps((float)rows / (count + rows) * count);
    pair old = floats32(s->mean + column, n), before = floats32(s->squares + column, n);
    const __m512 low = _mm512_sub_ps(mean.low, old.low), high = _mm512_sub_ps(mean.high, old.high);
    old.low = _mm512_fmadd_ps(low, share, old.low);
    old.high = _mm512_fmadd_ps(high, share, old.high);
    before.low = _mm512_add_ps(before.low, _mm512_fmadd_ps(_mm512_mul_ps(low, low), weight, squares.low));
    before.high = _mm512_add_ps(before.high, _mm512_fmadd_ps(_mm512_mul_ps(high, high), weight, squares.high));
    put32(s->mean + column, n, old);
    put32(s->squares + column, n, before);
}

/* y (images * pixels, outputs) = the convolution, by tiles `packed`, of x (images * sources, inputs), or with a scale of
 * relu(x * scale + shift). mean, variance: of each channel of y, biased. sums, if any: (images, outputs). */
void convolution_forward(const bf16 *x, int64_t images, int64_t sources, int64_t inputs, const float *scale, const float *shift,
             const bf16 *packed, int64_t taps, const int32_t *plan, int64_t pixels, int64_t outputs, bf16 *y,
             float *mean, float *variance, float *sums, int64_t threads) {
    const int64_t deep = ROUND_UP(inputs, SIDE) / SIDE, padded = deep * SIDE;
    const int64_t together = chunk_of(images, pixels, BLOCK_ROWS, threads);
    const int64_t chunks = (images + together - 1) / together;
    const int64_t columns = ROUND_UP(outputs, SIDE), half = taps * deep * TILE;
    const int as_it_is = !plan && !scale && inputs == padded;
    float *parts = aligned_alloc(64, ROUND_UP(threads * 2 * columns * (int64_t)sizeof(float), 64));
    int64_t counts[threads];
    if (!parts) abort();
    memset(counts, 0, sizeof counts);
    memset(parts, 0, threads * 2 * columns * sizeof(float));
    if (sums) memset(sums, 0, images * outputs * sizeof(float));
#pragma omp parallel num_threads(threads)
    {
        const int me = omp_get_thread_num(), team = omp_get_num_threads(); /* which may be fewer than `threads` */
        const statistics mine = {parts + 2 * me * columns, parts + (2 * me + 1) * columns, sums};
        bf16 *copy = scratch(LEFT, BLOCK_ROWS * MOST_TAPS * padded * sizeof(bf16));
        bf16 *read = as_it_is ? NULL : zeros(INPUT, together * (plan ? bordered(plan) : sources) * padded);
        rows_of_block block;
        left_side sides[BLOCK_ROWS / SIDE];
        float c[SIDE * SIDE] __attribute__((aligned(64)));
        int64_t count = 0;
        tiles_begin();
        for (int64_t chunk = chunks * me / team; chunk < chunks * (me + 1) / team; chunk++) {
            const int64_t i = chunk * together, n = images - i < together ? images - i : together;
            const bf16 *from = x + i * sources * inputs;
            if (!as_it_is) {
                read_images(from, n, inputs, scale, shift, plan, sources, read, padded);
                from = read;
            }
            const int32_t *at = plan ? plan + PLAN_HEADER : NULL;
            for (int k = 0; k < (plan ? plan[0] : 1); k++) {
                group cl = itself(pixels);
                if (plan) at = read_group(at, &cl);
                for (int64_t first = 0; first < n * cl.pixels; first += BLOCK_ROWS) {
                    const int64_t rows = n * cl.pixels - first < BLOCK_ROWS ? n * cl.pixels - first : BLOCK_ROWS;
                    name_rows(&block, &cl, i, first, rows, pixels);
                    left_sides(sides, from, plan, i, &cl, &block, first, rows, deep, copy);
                    for (int64_t column = 0; column < outputs; column += SIDE) {
                        const bf16 *b = packed + column / 16 * half;
                        for (int64_t r = 0; r < rows; r += SIDE) {
                            multiply(sides + r / SIDE, cl.taps, cl.tap, deep, b, b + half, c);
                            finish_forward(c, rows - r < SIDE ? rows - r : SIDE, block.place + r, block.image + r, y,
                                           outputs, column, &mine, count + r);
                        }
                    }
                    count += rows;
                }
            }
        }
        tiles_end();
        streamed();
        counts[me] = count;
    }
    int64_t count = 0;
    memset(mean, 0, outputs * sizeof(float));
    memset(variance, 0, outputs * sizeof(float));
    for (int64_t t = 0; t < threads; t++) {
        if (!counts[t]) continue;
        const float *their_mean = parts + 2 * t * columns, *their_squares = their_mean + columns;
        const float share = (float)counts[t] / (count + counts[t]), weight = (float)count * share;
        for (int64_t j = 0; j < outputs; j++) {
            const float d = their_mean[j] - mean[j];
            mean[j] += d * share;
            variance[j] += their_squares[j] + d * d * weight;
        }
        count += counts[t];
    }
    for (int64_t j = 0; j < outputs; j++) variance[j] /= count;
    free(parts);
}

#endif
