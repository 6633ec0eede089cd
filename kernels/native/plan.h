/* Which pixels a convolution reads, and how: through the batch norm and ReLU before it, or, backward, as the gradient of
 * what it made. */

#pragma once

#include "tiles.h"

enum { DIRECT_BYTES = 1024 }; /* between rows of a tile, up to which they are read in place: more collide in the cache */

/* A plan says how the pixels of a map are made from those of another, whose images have a border of zeros, one pixel
 * wide. It lists groups of the pixels; those of a group meet the same taps:
 *   groups, stride, height and width of the map that is read, and of each group:
 *   pixels, taps, the taps' numbers, the pixels, (pixels, taps) places in the bordered image.
 * With a stride, any 16 pixels of a group read places that are so far from each other.
 * NULL: every pixel is made from itself, by one tap. */
typedef struct {
    int64_t pixels, taps;
    const int32_t *tap, *pixel, *source;
} group;

enum { PLAN_HEADER = 4 };

static inline const int32_t *read_group(const int32_t *plan, group *c) {
    c->pixels = plan[0];
    c->taps = plan[1];
    c->tap = plan + 2;
    c->pixel = c->tap + c->taps;
    c->source = c->pixel + c->pixels;
    return c->source + c->pixels * c->taps;
}

/* Images of a chunk: the fewest that have `rows` pixels, or less, so that each thread has as many chunks as the others. */
static inline int64_t chunk_of(int64_t images, int64_t pixels, int64_t rows, int64_t threads) {
    const int64_t together = (rows + pixels - 1) / pixels, chunks = ROUND_UP((images + together - 1) / together, threads);
    return images ? (images + chunks - 1) / chunks : 1;
}

static inline group itself(int64_t pixels) {
    static const int32_t first = 0;
    return (group){pixels, 1, &first, NULL, NULL};
}

static inline int64_t bordered(const int32_t *plan) { return (plan[2] + 2) * (int64_t)(plan[3] + 2); }

/* Rows of a block: of which image, which of the group's pixels, and where in the map that is made. */
typedef struct {
    int64_t image[BLOCK_ROWS], pixel[BLOCK_ROWS], place[BLOCK_ROWS];
} rows_of_block;

/* Of the group's rows in all images from image `i` on, from row `first` on. `pixels`: of an image that is made. */
static inline void name_rows(rows_of_block *b, const group *c, int64_t i, int64_t first, int64_t rows, int64_t pixels) {
    int64_t image = first / c->pixels, pixel = first % c->pixels;
    for (int64_t r = 0; r < rows; r++) {
        b->image[r] = i + image;
        b->pixel[r] = pixel;
        b->place[r] = (i + image) * pixels + (c->pixel ? c->pixel[pixel] : pixel);
        if (++pixel == c->pixels) pixel = 0, image++;
    }
}

static inline const bf16 *source_row(const bf16 *from, int64_t size, int64_t i, const group *c, const rows_of_block *b,
                                     int64_t r, int64_t t, int64_t padded) {
    return from + ((b->image[r] - i) * size + c->source[b->pixel[r] * c->taps + t]) * padded;
}

/* Make the left sides of the blocks of 32 rows. from: what is read, (rows, padded), bordered with a plan. Rows that are
 * not in order, or too far apart, are copied. */
static inline void left_sides(left_side *sides, const bf16 *from, const int32_t *plan, int64_t i, const group *c,
                       const rows_of_block *b, int64_t first, int64_t rows, int64_t deep, bf16 *copy) {
    const int64_t padded = deep * SIDE;
    const int64_t stride = plan ? plan[1] * padded : padded;
    const int in_place = stride && 2 * stride <= DIRECT_BYTES && (plan || rows % SIDE == 0);
    for (int64_t t = 0; t < c->taps; t++)
        for (int64_t r = 0; r < rows; r += SIDE) {
            left_side *s = sides + r / SIDE;
            s->stride = in_place ? stride : SIDE;
            s->step = in_place ? SIDE : BLOCK_ROWS * SIDE;
            if (!in_place) {
                s->upper[t] = copy + t * deep * BLOCK_ROWS * SIDE + r * SIDE;
                s->lower[t] = s->upper[t] + TILE;
            } else if (plan) {
                s->upper[t] = source_row(from, bordered(plan), i, c, b, r, t, padded);
                s->lower[t] = r + 16 < rows ? source_row(from, bordered(plan), i, c, b, r + 16, t, padded) : s->upper[t];
            } else {
                s->upper[t] = from + (first + r) * padded;
                s->lower[t] = s->upper[t] + 16 * padded;
            }
        }
    if (in_place) return;
    for (int64_t t = 0; t < c->taps; t++) {
        const bf16 *row[BLOCK_ROWS];
        for (int64_t r = 0; r < rows; r++)
            row[r] = plan ? source_row(from, bordered(plan), i, c, b, r, t, padded) : from + (first + r) * padded;
        for (int64_t k = 0; k < deep; k++, copy += BLOCK_ROWS * SIDE)
            for (int64_t r = 0; r < rows; r++)
                _mm512_store_si512(copy + r * SIDE, _mm512_loadu_si512(row[r] + SIDE * k));
    }
}

/* --- what a convolution reads -------------------------------------------------------------------------------------- */

/* Rows (count, channels) to (count, padded) through relu(x * scale + shift), or as they are without a scale. */
static inline void normalise(const bf16 *x, int64_t count, int64_t channels, const float *scale, const float *shift, bf16 *out,
                      int64_t padded) {
    for (int64_t first = 0; first < count; first += PASS_ROWS) {
        const int64_t end = least(first + PASS_ROWS, count);
        for (int64_t c = 0; c < channels; c += SIDE) {
            const int64_t n = channels - c;
            const __mmask32 mask = mask32(n);
            if (!scale) {
                for (int64_t r = first; r < end; r++) {
                    __builtin_prefetch(x + (r + PASS_ROWS) * channels + c);
                    _mm512_store_si512(out + r * padded + c, _mm512_maskz_loadu_epi16(mask, x + r * channels + c));
                }
                continue;
            }
            const pair a = floats32(scale + c, n), b = floats32(shift + c, n);
            for (int64_t r = first; r < end; r++) {
                __builtin_prefetch(x + (r + PASS_ROWS) * channels + c);
                pair v = load32(x + r * channels + c, mask);
                v.low = relu(_mm512_fmadd_ps(v.low, a.low, b.low));
                v.high = relu(_mm512_fmadd_ps(v.high, a.high, b.high));
                _mm512_store_si512(out + r * padded + c, rounded(v));
            }
        }
    }
}

/* What images of a map look like to a convolution: bordered with a plan. out is zero where nothing is written. */
static inline void read_images(const bf16 *x, int64_t images, int64_t channels, const float *scale, const float *shift,
                        const int32_t *plan, int64_t sources, bf16 *out, int64_t padded) {
    if (!plan) {
        normalise(x, images * sources, channels, scale, shift, out, padded);
        return;
    }
    const int64_t height = plan[2], width = plan[3];
    for (int64_t i = 0; i < images; i++)
        for (int64_t y = 0; y < height; y++)
            normalise(x + (i * sources + y * width) * channels, width, channels, scale, shift,
                      out + (i * bordered(plan) + (y + 1) * (width + 2) + 1) * padded, padded);
}

/* The gradient of what a convolution makes, a, from that past its batch norm, g: g * gain + offset + a * slope. Only what
 * has its bit counts of g, or what is past the ReLU of a * past_scale + past_shift. */
typedef struct {
    const bf16 *g, *a;
    const uint32_t *bits;                     /* (rows, channels / 32) or NULL */
    const float *past_scale, *past_shift;     /* (channels,) or NULL */
    const float *gain, *offset, *slope;       /* (channels,); gain and offset (images, channels) if by_image */
    int64_t by_image;
} gradient;

static inline void read_gradient(const gradient *d, int64_t image, int64_t row, int64_t count, int64_t channels, bf16 *out,
                          int64_t padded) {
    const int64_t words = (channels + SIDE - 1) / SIDE, vector = d->by_image ? image * channels : 0;
    for (int64_t first = 0; first < count; first += PASS_ROWS) {
        const int64_t end = least(first + PASS_ROWS, count);
        for (int64_t c = 0; c < channels; c += SIDE) {
            const int64_t n = channels - c;
            const __mmask32 mask = mask32(n);
            const pair gain = floats32(d->gain + vector + c, n), offset = floats32(d->offset + vector + c, n);
            const pair slope = floats32(d->slope + c, n);
            pair s = {}, t = {};
            if (d->past_scale) s = floats32(d->past_scale + c, n), t = floats32(d->past_shift + c, n);
            for (int64_t r = first; r < end; r++) {
                const int64_t at = (row + r) * channels + c;
                const __mmask32 counts = d->bits ? mask & d->bits[(row + r) * words + c / SIDE] : mask;
                __builtin_prefetch(d->a + at + PASS_ROWS * channels);
                __builtin_prefetch(d->g + at + PASS_ROWS * channels);
                const pair a = load32(d->a + at, mask);
                pair g = load32(d->g + at, counts), v;
                if (d->past_scale) {
                    g.low = _mm512_maskz_mov_ps(passes(_mm512_fmadd_ps(a.low, s.low, t.low)), g.low);
                    g.high = _mm512_maskz_mov_ps(passes(_mm512_fmadd_ps(a.high, s.high, t.high)), g.high);
                }
                v.low = _mm512_fmadd_ps(g.low, gain.low, _mm512_fmadd_ps(a.low, slope.low, offset.low));
                v.high = _mm512_fmadd_ps(g.high, gain.high, _mm512_fmadd_ps(a.high, slope.high, offset.high));
                _mm512_store_si512(out + r * padded + c, rounded(v));
            }
        }
    }
}

static inline void read_gradients(const gradient *d, int64_t image, int64_t images, int64_t channels, const int32_t *plan,
                           int64_t pixels, bf16 *out, int64_t padded) {
    for (int64_t i = image; i < image + images; i++) {
        if (!plan) {
            read_gradient(d, i, i * pixels, pixels, channels, out + (i - image) * pixels * padded, padded);
            continue;
        }
        const int64_t height = plan[2], width = plan[3];
        for (int64_t y = 0; y < height; y++)
            read_gradient(d, i, i * pixels + y * width, width, channels,
                          out + ((i - image) * bordered(plan) + (y + 1) * (width + 2) + 1) * padded, padded);
    }
}

