/* The gradients of a convolution's weight and input, which read the gradient of its output through the batch norm after
 * it, and leave that of its input past the ReLU before it, with the sums that the batch norm before it asks for. Nothing
 * between is ever in memory.
 */

#ifdef __AVX512BF16__

#include "weight_gradient.h"

/* What is made of the gradient of a convolution's input, which the block epilogue's shortcut may share. */
typedef struct {
    const bf16 *x;
    const float *scale, *shift, *mean; /* of the batch norm before, or NULL */
    const bf16 *add;                   /* (images, add_pixels, inputs) or NULL */
    const uint32_t *add_bits;          /* where `add` counts, or NULL */
    const int32_t *add_source;         /* (sources,) of its pixels, or NULL: the same pixel */
    const float *add_factor;           /* (sources,) */
    int64_t add_pixels, sources;
    float *total, *product; /* sums of g and of g * (x - mean) */
} destination;

static inline void finish_backward(const float *c, int64_t rows, const int64_t *place, bf16 *dx, int64_t channels,
                                   int64_t column, const destination *d) {
    const int64_t n = channels - column;
    const __mmask32 mask = mask32(n);
    if (!d->scale) {
        const int64_t words = (channels + SIDE - 1) / SIDE;
        for (int64_t r = 0; r < rows; r++) {
            pair v = {_mm512_load_ps(c + r * SIDE), _mm512_load_ps(c + r * SIDE + 16)};
            if (d->add) {
                int64_t from = place[r];
                __m512 factor = _mm512_set1_ps(1);
                if (d->add_source) {
                    const int64_t pixel = place[r] % d->sources;
                    from = place[r] / d->sources * d->add_pixels + d->add_source[pixel];
                    factor = _mm512_set1_ps(d->add_factor[pixel]);
                }
                const __mmask32 counts = d->add_bits ? mask & d->add_bits[from * words + column / SIDE] : mask;
                const pair more = load32(d->add + from * channels + column, counts);
                __builtin_prefetch(d->add + (from + BLOCK_ROWS) * channels + column);
                v.low = _mm512_fmadd_ps(more.low, factor, v.low);
                v.high = _mm512_fmadd_ps(more.high, factor, v.high);
            }
            stream32(dx + place[r] * channels + column, n, rounded(v));
        }
        return;
    }
    const pair scale = floats32(d->scale + column, n), shift = floats32(d->shift + column, n);
    const pair mean = floats32(d->mean + column, n);
    pair total = floats32(d->total + column, n), product = floats32(d->product + column, n);
    for (int64_t r = 0; r < rows; r++) {
        const int64_t at = place[r] * channels + column;
        const pair x = load32(d->x + at, mask);
        const __mmask16 low = passes(_mm512_fmadd_ps(x.low, scale.low, shift.low));
        const __mmask16 high = passes(_mm512_fmadd_ps(x.high, scale.high, shift.high));
        const pair g = {_mm512_maskz_loadu_ps(low, c + r * SIDE), _mm512_maskz_loadu_ps(high, c + r * SIDE + 16)};
        total.low = _mm512_add_ps(total.low, g.low);
        total.high = _mm512_add_ps(total.high, g.high);
        product.low = _mm512_fmadd_ps(g.low, _mm512_sub_ps(x.low, mean.low), product.low);
        product.high = _mm512_fmadd_ps(g.high, _mm512_sub_ps(x.high, mean.high), product.high);
        stream32(dx + at, n, rounded(g));
    }
    put32(d->total + column, n, total);
    put32(d->product + column, n, product);
}

/* dx of `n` images from `i` on, whose gradients are laid out for products. */
static void input_gradient(const problem *p, const bf16 *gradients, int64_t i, int64_t n, bf16 *copy,
                           const destination *to) {
    const int64_t half = p->taps * p->out_deep * TILE;
    rows_of_block block;
    left_side sides[BLOCK_ROWS / SIDE];
    float c[SIDE * SIDE] __attribute__((aligned(64)));
    const int32_t *at = p->back ? p->back + PLAN_HEADER : NULL;
    for (int k = 0; k < (p->back ? p->back[0] : 1); k++) {
        group g = itself(p->sources);
        if (p->back) at = read_group(at, &g);
        for (int64_t first = 0; first < n * g.pixels; first += BLOCK_ROWS) {
            const int64_t rows = n * g.pixels - first < BLOCK_ROWS ? n * g.pixels - first : BLOCK_ROWS;
            name_rows(&block, &g, i, first, rows, p->sources);
            left_sides(sides, gradients, p->back, i, &g, &block, first, rows, p->out_deep, copy);
            for (int64_t column = 0; column < p->inputs; column += SIDE) {
                const bf16 *b = p->packed + column / 16 * half;
                for (int64_t r = 0; r < rows; r += SIDE) {
                    multiply(sides + r / SIDE, g.taps, g.tap, p->out_deep, b, b + half, c);
                    finish_backward(c, rows - r < SIDE ? rows - r : SIDE, block.place + r, p->dx, p->inputs, column, to);
                }
            }
        }
    }
}

/* Gradients of the weight, float (outputs, taps, inputs), and of the input, (images * sources, inputs), of
 * convolution_forward; either may be NULL.
 *
 * The gradient of the output is g * gain + offset + a * slope, where a is the output; of g only what has its bit, or past
 * the ReLU of a * past_scale + past_shift, where these are not NULL. With a scale dx is the gradient past the ReLU before,
 * and total and product are its sums and those of dx * (x - mean); without, `add`, if any, is added. packed: the
 * convolution's tiles the other way round. */
void convolution_backward(const bf16 *x, int64_t images, int64_t sources, int64_t inputs, const float *scale,
                          const float *shift, const float *mean, const bf16 *g, const bf16 *a, const uint32_t *bits,
                          const float *past_scale, const float *past_shift, const float *gain, const float *offset,
                          const float *slope, int64_t by_image, const bf16 *packed, int64_t taps, const int32_t *plan,
                          const int32_t *back, int64_t pixels, int64_t outputs, bf16 *dx, const bf16 *add,
                          const uint32_t *add_bits, const int32_t *add_source, const float *add_factor,
                          int64_t add_pixels, float *total, float *product, float *dweight, int64_t threads) {
    problem p = {
        .x = x, .packed = packed, .scale = scale, .shift = shift, .images = images, .sources = sources, .inputs = inputs,
        .pixels = pixels, .outputs = outputs, .taps = taps, .plan = plan, .back = back, .dx = dx, .dweight = dweight,
        .source = {g, a, bits, past_scale, past_shift, gain, offset, slope, by_image},
        .in_deep = ROUND_UP(inputs, SIDE) / SIDE, .out_deep = ROUND_UP(outputs, SIDE) / SIDE,
    };
    const int64_t in_padded = p.in_deep * SIDE, out_padded = p.out_deep * SIDE, weights = taps * in_padded * out_padded;
    p.shared = dweight && weights > images * (pixels * out_padded + sources * in_padded);
    p.together = p.shared ? images : chunk_of(images, pixels, GRADIENT_ROWS, threads);
    p.g_size = p.together * (back ? bordered(back) : pixels);
    p.x_size = p.together * (plan ? bordered(plan) : sources);
    p.flip = !plan && in_padded < out_padded;
    p.m_deep = p.flip ? p.in_deep : p.out_deep;
    p.n_deep = p.flip ? p.out_deep : p.in_deep;
    int32_t *offsets = find_rows(&p);
    p.offsets = offsets;
    const int64_t chunks = p.shared ? threads : (images + p.together - 1) / p.together;
    const int64_t per_chunk = p.shared ? (images + threads - 1) / threads : p.together;
    const int64_t g_count = (p.g_size + 1) * out_padded, x_count = dweight ? (p.x_size + 1) * in_padded : 0;
    const int64_t left_count = dweight ? 2 * p.m_deep * p.all_steps * TILE : 0;
    bf16 *common = p.shared ? zeros(COMMON, g_count + x_count + left_count) : NULL;
    float *parts = aligned_alloc(64, threads * 2 * in_padded * sizeof(float));
    if (!parts) abort();
    memset(parts, 0, threads * 2 * in_padded * sizeof(float));
    const float *sums[threads];
    int64_t begun[threads];
    memset(begun, 0, sizeof begun);
#pragma omp parallel num_threads(threads)
    {
        const int me = omp_get_thread_num(), team = omp_get_num_threads(); /* which may be fewer than `threads` */
        const destination to = {x, scale, shift, mean, add, add_bits, add_source, add_factor, add_pixels, sources,
                                parts + 2 * me * in_padded, parts + (2 * me + 1) * in_padded};
        bf16 *copy = dx ? scratch(LEFT, BLOCK_ROWS * MOST_TAPS * out_padded * sizeof(bf16)) : NULL;
        bf16 *gradients = p.shared ? common : zeros(GRADIENT, g_count);
        bf16 *read = p.shared ? common + g_count : zeros(INPUT, x_count);
        bf16 *left = p.shared ? read + x_count : scratch(TRANSPOSED, left_count * sizeof(bf16));
        bf16 *panel = dweight ? scratch(PANEL, 2 * p.most_steps * TILE * sizeof(bf16)) : NULL;
        float *mine = dweight && !p.shared ? scratch(WEIGHT, weights * sizeof(float)) : NULL;
        sums[me] = mine;
        tiles_begin();
        for (int64_t chunk = chunks * me / team; chunk < chunks * (me + 1) / team; chunk++) {
            const int64_t i = chunk * per_chunk, n = images - i < per_chunk ? images - i : per_chunk;
            if (n <= 0) continue;
            const int64_t here = p.shared ? i : 0, g_rows = p.g_size / p.together, x_rows = p.x_size / p.together;
            bf16 *my_gradients = gradients + here * g_rows * out_padded;
            read_gradients(&p.source, i, n, outputs, back, pixels, my_gradients, out_padded);
            if (dweight)
                read_images(x + i * sources * inputs, n, inputs, scale, shift, plan, sources,
                            read + here * x_rows * in_padded, in_padded);
            if (dx) input_gradient(&p, my_gradients, i, n, copy, &to);
            if (!mine) continue;
            if (n < p.together) { /* the images that are not there add nothing */
                const int64_t missing = (p.together - n) * sizeof(bf16);
                memset(gradients + n * g_rows * out_padded, 0, missing * g_rows * out_padded);
                memset(read + n * x_rows * in_padded, 0, missing * x_rows * in_padded);
            }
            begun[me] = weight_gradient(&p, gradients, read, left, panel, mine, begun[me]);
        }
#pragma omp barrier
        if (p.shared)
            shared_weight_gradient(&p, gradients, read, left, panel);
        else if (dweight) {
            float c[SIDE * SIDE] __attribute__((aligned(64)));
#pragma omp for collapse(3) schedule(static)
            for (int64_t t = 0; t < taps; t++)
                for (int64_t j = 0; j < p.n_deep; j++)
                    for (int64_t m = 0; m < p.m_deep; m++) {
                        memset(c, 0, sizeof c);
                        for (int64_t other = 0; other < threads; other++) {
                            if (!(begun[other] >> t & 1)) continue;
                            const float *theirs = sums[other] + ((t * p.n_deep + j) * p.m_deep + m) * SIDE * SIDE;
                            for (int e = 0; e < SIDE * SIDE; e++) c[e] += theirs[e];
                        }
                        put_weight(c, p.flip, m, j, t, outputs, taps, inputs, dweight);
                    }
        }
        tiles_end();
        streamed();
    }
    if (dx && scale)
        for (int64_t j = 0; j < inputs; j++) {
            total[j] = product[j] = 0;
            for (int64_t t = 0; t < threads; t++) {
                total[j] += parts[2 * t * in_padded + j];
                product[j] += parts[(2 * t + 1) * in_padded + j];
            }
        }
    free(parts);
    free(offsets);
}

#endif
