/* The end of a bottleneck, from its last batch norm on: scale and shift of each image, sum with the shortcut, ReLU. */

#ifdef __AVX512BF16__

#include "tiles.h"

/* y = relu(a * gain + offset + other), gain and offset (images, channels), where other is the shortcut, or with a scale
 * shortcut * scale + shift. bits: where y is positive. */
void residual_join(const bf16 *a, const float *gain, const float *offset, const bf16 *shortcut, const float *scale,
          const float *shift, int64_t images, int64_t pixels, int64_t channels, bf16 *y, uint32_t *bits,
          int64_t threads) {
    const int64_t words = (channels + SIDE - 1) / SIDE;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for collapse(2) schedule(static) nowait
        for (int64_t i = 0; i < images; i++)
            for (int64_t pixel = 0; pixel < pixels; pixel += PASS_ROWS) {
                const int64_t first = i * pixels + pixel, end = i * pixels + least(pixel + PASS_ROWS, pixels);
                for (int64_t c = 0; c < channels; c += SIDE) {
                    const int64_t n = channels - c;
                    const __mmask32 mask = mask32(n);
                    const pair u = floats32(gain + i * channels + c, n), w = floats32(offset + i * channels + c, n);
                    pair p = {}, q = {};
                    if (scale) p = floats32(scale + c, n), q = floats32(shift + c, n);
                    for (int64_t r = first; r < end; r++) {
                        const int64_t at = r * channels + c;
                        const pair v = load32(a + at, mask);
                        pair s = load32(shortcut + at, mask);
                        __builtin_prefetch(a + at + PASS_ROWS * channels);
                        __builtin_prefetch(shortcut + at + PASS_ROWS * channels);
                        if (scale) {
                            s.low = _mm512_fmadd_ps(s.low, p.low, q.low);
                            s.high = _mm512_fmadd_ps(s.high, p.high, q.high);
                        }
                        s.low = relu(_mm512_add_ps(s.low, _mm512_fmadd_ps(v.low, u.low, w.low)));
                        s.high = relu(_mm512_add_ps(s.high, _mm512_fmadd_ps(v.high, u.high, w.high)));
                        stream32(y + at, n, rounded(s));
                        const uint32_t low = passes(s.low), high = passes(s.high);
                        bits[r * words + c / SIDE] = (low | high << 16) & mask;
                    }
                }
            }
        streamed();
    }
}

/* Of g = dy where bits are set: total and product, (images, channels), the sums over an image of g and g * (a - mean);
 * with a shortcut, the sums over all of g * (shortcut - shortcut_mean), (channels,). */
void residual_sums(const bf16 *dy, const uint32_t *bits, const bf16 *a, const float *mean, const bf16 *shortcut,
               const float *shortcut_mean, int64_t images, int64_t pixels, int64_t channels, float *total,
               float *product, float *shortcut_product, int64_t threads) {
    const int64_t words = (channels + SIDE - 1) / SIDE, padded = words * SIDE;
    float *parts = aligned_alloc(64, threads * padded * sizeof(float));
    if (!parts) abort();
    memset(parts, 0, threads * padded * sizeof(float));
#pragma omp parallel num_threads(threads)
    {
        float *mine = parts + omp_get_thread_num() * padded;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < images; i++)
            for (int64_t first = i * pixels; first < (i + 1) * pixels; first += PASS_ROWS) {
                const int64_t end = least(first + PASS_ROWS, (i + 1) * pixels);
                for (int64_t c = 0; c < channels; c += SIDE) {
                    const int64_t n = channels - c, at = i * channels + c;
                    const __mmask32 mask = mask32(n);
                    const pair m = floats32(mean + c, n);
                    pair t = {}, p = {}, q = {}, sm = {};
                    if (first > i * pixels) t = floats32(total + at, n), p = floats32(product + at, n);
                    if (shortcut) q = floats32(mine + c, SIDE), sm = floats32(shortcut_mean + c, n);
                    for (int64_t r = first; r < end; r++) {
                        const pair g = load32(dy + r * channels + c, mask & bits[r * words + c / SIDE]);
                        const pair v = load32(a + r * channels + c, mask);
                        __builtin_prefetch(dy + (r + PASS_ROWS) * channels + c);
                        __builtin_prefetch(a + (r + PASS_ROWS) * channels + c);
                        t.low = _mm512_add_ps(t.low, g.low);
                        t.high = _mm512_add_ps(t.high, g.high);
                        p.low = _mm512_fmadd_ps(g.low, _mm512_sub_ps(v.low, m.low), p.low);
                        p.high = _mm512_fmadd_ps(g.high, _mm512_sub_ps(v.high, m.high), p.high);
                        if (!shortcut) continue;
                        __builtin_prefetch(shortcut + (r + PASS_ROWS) * channels + c);
                        const pair s = load32(shortcut + r * channels + c, mask);
                        q.low = _mm512_fmadd_ps(g.low, _mm512_sub_ps(s.low, sm.low), q.low);
                        q.high = _mm512_fmadd_ps(g.high, _mm512_sub_ps(s.high, sm.high), q.high);
                    }
                    put32(total + at, n, t);
                    put32(product + at, n, p);
                    if (shortcut) put32(mine + c, SIDE, q);
                }
            }
    }
    if (shortcut)
        for (int64_t j = 0; j < channels; j++) {
            shortcut_product[j] = 0;
            for (int64_t t = 0; t < threads; t++) shortcut_product[j] += parts[t * padded + j];
        }
    free(parts);
}

#endif
