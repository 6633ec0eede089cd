/* The gradient of a convolution's weight: products of the gradient of what it makes with what it reads, over pixels. */

#pragma once

#include "plan.h"

enum {
    GRADIENT_ROWS = 256, /* of a chunk of images: see `chunk_of` */
    RUN_STEPS = 8,       /* of 32 rows: what the products of a weight's gradient sweep over stays in the L1 cache */
};

/* One convolution. With a large weight one chunk of all images is shared by all threads, who divide the weight among
 * themselves: sums of the whole weight for each thread would be more to move than what the products read. Otherwise each
 * thread has chunks of its own, which stay in its cache, and sums of its own. */
typedef struct {
    const bf16 *x, *packed;
    const float *scale, *shift; /* of the batch norm before, or NULL */
    int64_t images, sources, inputs, pixels, outputs, taps;
    const int32_t *plan, *back;
    gradient source;
    bf16 *dx;
    float *dweight;
    int shared;
    int flip;                            /* whether the input is turned, not the gradient: the narrower one is */
    int64_t together;                    /* images of a chunk */
    int64_t x_size, g_size;              /* rows of a chunk as products read them */
    int64_t in_deep, out_deep, m_deep, n_deep;
    const int32_t *offsets;              /* see `find_rows` */
    int64_t most_steps, all_steps;       /* blocks of 32 rows of a chunk that meet in one group, and in all */
} problem;

static int groups(const problem *p) { return p->plan ? p->plan[0] : 1; }

/* The next group, and how many blocks of 32 rows a chunk has of it. */
static group next_group(const problem *p, const int32_t **at, int64_t *steps) {
    group c = itself(p->pixels);
    if (p->plan) *at = read_group(*at, &c);
    *steps = (p->together * c.pixels + SIDE - 1) / SIDE;
    return c;
}

static const int32_t *first_group(const problem *p) { return p->plan ? p->plan + PLAN_HEADER : NULL; }

/* Where the rows that meet are in a chunk: of each group the gradient's, then the input's for each tap. The last ones, up
 * to a multiple of 32, are a row of zeros behind the others. */
static int32_t *find_rows(problem *p) {
    const int32_t *at = first_group(p);
    int64_t size = 0, steps;
    for (int k = 0; k < groups(p); k++) {
        const group c = next_group(p, &at, &steps);
        size += steps * SIDE * (1 + c.taps);
        p->all_steps += steps;
        if (steps > p->most_steps) p->most_steps = steps;
    }
    int32_t *offsets = aligned_alloc(64, ROUND_UP(size * (int64_t)sizeof(int32_t), 64)), *to = offsets;
    if (!offsets) abort();
    at = first_group(p);
    for (int k = 0; k < groups(p); k++) {
        const group c = next_group(p, &at, &steps);
        const int64_t rows = steps * SIDE;
        for (int64_t r = 0; r < rows; r++) {
            const int64_t image = r / c.pixels, pixel = r % c.pixels, inside = image < p->together;
            int64_t place = r;
            if (p->back) {
                const int64_t made = c.pixel[pixel], width = p->back[3];
                place = image * bordered(p->back) + (made / width + 1) * (width + 2) + made % width + 1;
            }
            to[r] = (inside ? place : p->g_size) * p->out_deep * SIDE;
            for (int64_t t = 0; t < c.taps; t++) {
                place = p->plan ? image * bordered(p->plan) + c.source[pixel * c.taps + t] : r;
                to[(1 + t) * rows + r] = (inside ? place : p->x_size) * p->in_deep * SIDE;
            }
        }
        to += rows * (1 + c.taps);
    }
    return offsets;
}

/* 32 channels of 32 rows, each `offset` from `from`: pairs of rows as 16 + 16 vectors of (16 channels, 2). */
static inline void interleave(const bf16 *from, const int32_t *offset, __m512i *low, __m512i *high) {
#pragma GCC unroll 16
    for (int p = 0; p < 16; p++) {
        const __m512i a = _mm512_load_si512(from + offset[2 * p]), b = _mm512_load_si512(from + offset[2 * p + 1]);
        low[p] = pairs(a, b, 0);
        high[p] = pairs(a, b, 1);
    }
}

/* 32 channels of a chunk's rows, turned: tiles (16 channels, 32 rows), `steps` of the first 16, then of the others. */
static void turn(const bf16 *from, const int32_t *offset, int64_t m, int64_t steps, bf16 *left) {
    for (int64_t s = 0; s < steps; s++) {
        __m512i low[16], high[16];
        interleave(from + m * SIDE, offset + s * SIDE, low, high);
        transpose(low, left + s * TILE);
        transpose(high, left + (steps + s) * TILE);
    }
}

/* 32 channels of a chunk's rows as the right side of a product, in the same order. */
static void make_panel(const bf16 *from, const int32_t *offset, int64_t j, int64_t steps, bf16 *panel) {
    for (int64_t s = 0; s < steps; s++) {
        __m512i low[16], high[16];
        interleave(from + j * SIDE, offset + s * SIDE, low, high);
        for (int p = 0; p < 16; p++) {
            _mm512_store_si512(panel + s * TILE + 32 * p, low[p]);
            _mm512_store_si512(panel + (steps + s) * TILE + 32 * p, high[p]);
        }
    }
}

/* A block of sums, four tiles, to its place in the weight's gradient. */
static void put_weight(const float *c, int flip, int64_t m, int64_t j, int64_t t, int64_t outputs, int64_t taps,
                       int64_t inputs, float *dweight) {
    for (int part = 0; part < 4; part++) {
        int64_t o = m * SIDE + part / 2 * 16, in = j * SIDE + part % 2 * 16;
        const float *from = c + part * 256;
        float turned[256] __attribute__((aligned(64)));
        if (flip) {
            __m512i v[16];
            for (int r = 0; r < 16; r++) v[r] = _mm512_load_si512(from + 16 * r);
            transpose(v, (bf16 *)turned);
            const int64_t other = o;
            o = in, in = other, from = turned;
        }
        for (int64_t r = 0; r < 16 && o + r < outputs; r++)
            stream16(dweight + ((o + r) * taps + t) * inputs + in, inputs - in, _mm512_load_ps(from + 16 * r));
    }
}

/* Blocks of 32 rows of a chunk that meet in a group, from `first` on. */
typedef struct {
    const int32_t *offsets; /* the group's */
    int64_t rows, first, steps;
} run;

/* Add what a run of rows gives to the sums of 32 columns and all rows of the weight at one tap of a group, which begin
 * with it unless `begun`. left: the turned side. */
static void add_products(const problem *p, const bf16 *gradients, const bf16 *read, const run *of, int64_t t, int64_t j,
                         const bf16 *left, bf16 *panel, float *sum, int begun) {
    const int64_t steps = of->steps;
    const int32_t *offsets = of->offsets + (p->flip ? 0 : (1 + t) * of->rows) + of->first * SIDE;
    make_panel(p->flip ? gradients : read, offsets, j, steps, panel);
    for (int64_t m = 0; m < p->m_deep; m++) {
        const bf16 *upper = left + 2 * m * steps * TILE;
        accumulate(upper, upper + steps * TILE, panel, panel + steps * TILE, steps, sum + m * SIDE * SIDE, begun);
    }
}

static void turn_side(const problem *p, const bf16 *gradients, const bf16 *read, const run *of, int64_t m, bf16 *left) {
    const int32_t *offsets = of->offsets + (p->flip ? of->rows : 0) + of->first * SIDE;
    turn(p->flip ? read : gradients, offsets, m, of->steps, left + 2 * m * of->steps * TILE);
}

/* What a chunk of a thread's own gives to the thread's sums: (taps, n_deep, m_deep) blocks. Returns the bits of the taps
 * whose sums have begun. */
static int64_t weight_gradient(const problem *p, const bf16 *gradients, const bf16 *read, bf16 *left, bf16 *panel,
                               float *sums, int64_t begun) {
    const int32_t *at = first_group(p), *offsets = p->offsets;
    int64_t steps;
    for (int k = 0; k < groups(p); k++) {
        const group c = next_group(p, &at, &steps);
        for (int64_t first = 0; first < steps; first += RUN_STEPS) {
            const run of = {offsets, steps * SIDE, first, steps - first < RUN_STEPS ? steps - first : RUN_STEPS};
            for (int64_t m = 0; m < p->m_deep; m++) turn_side(p, gradients, read, &of, m, left);
            for (int64_t t = 0; t < c.taps; t++) {
                for (int64_t j = 0; j < p->n_deep; j++)
                    add_products(p, gradients, read, &of, t, j, left, panel,
                                 sums + (c.tap[t] * p->n_deep + j) * p->m_deep * SIDE * SIDE, begun >> c.tap[t] & 1);
                begun |= (int64_t)1 << c.tap[t];
            }
        }
        offsets += steps * SIDE * (1 + c.taps);
    }
    return begun;
}

/* The same for the chunk of all images, by all threads; to dweight at once. */
static void shared_weight_gradient(const problem *p, const bf16 *gradients, const bf16 *read, bf16 *left, bf16 *panel) {
    const int32_t *at = first_group(p), *offsets = p->offsets;
    bf16 *to = left;
    int64_t steps;
    for (int k = 0; k < groups(p); k++) {
        const group c = next_group(p, &at, &steps);
        const run of = {offsets, steps * SIDE, 0, steps};
#pragma omp for schedule(static)
        for (int64_t m = 0; m < p->m_deep; m++) turn_side(p, gradients, read, &of, m, to);
        to += 2 * p->m_deep * steps * TILE;
        offsets += steps * SIDE * (1 + c.taps);
    }
    float *sums = scratch(WEIGHT, p->m_deep * SIDE * SIDE * sizeof(float));
#pragma omp for collapse(2) schedule(static)
    for (int64_t tap = 0; tap < p->taps; tap++)
        for (int64_t j = 0; j < p->n_deep; j++) {
            const int32_t *at = first_group(p), *offsets = p->offsets;
            const bf16 *from = left;
            int begun = 0;
            for (int k = 0; k < groups(p); k++) {
                const group c = next_group(p, &at, &steps);
                const run of = {offsets, steps * SIDE, 0, steps};
                for (int64_t t = 0; t < c.taps; t++)
                    if (c.tap[t] == tap) {
                        add_products(p, gradients, read, &of, t, j, from, panel, sums, begun);
                        begun = 1;
                    }
                from += 2 * p->m_deep * steps * TILE;
                offsets += steps * SIDE * (1 + c.taps);
            }
            if (!begun) memset(sums, 0, p->m_deep * SIDE * SIDE * sizeof(float));
            for (int64_t m = 0; m < p->m_deep; m++)
                put_weight(sums + m * SIDE * SIDE, p->flip, m, j, tap, p->outputs, p->taps, p->inputs, p->dweight);
        }
}

