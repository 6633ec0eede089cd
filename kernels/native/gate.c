/* Squeeze-and-excite and stochastic depth of a bottleneck, between the products of the former: what is (images, channels).
 * On maps of few pixels that is as much as the maps themselves. `gate` is NULL without squeeze-and-excite, `keep`,
 * (images,), without stochastic depth. All else is float, and (images, channels) or (channels,).
 */

#ifdef __AVX512BF16__

#include "bf16.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>

/* To 2 units in the last place: Cephes' expf (Moshier, 1992). NaN stays NaN. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float n = floorf(x * 1.44269504f + 0.5f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    const uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return (y * r * r + r + 1.0f) * power;
}

/* From the sums of each image: its means about the batch's, in their place; and past the batch norm, (images, channels)
 * bfloat16. */
void gate_squeeze(float *sums, int64_t images, int64_t channels, int64_t pixels, const float *mean, const float *scale,
                  const float *beta, bf16 *squeezed, int64_t threads) {
    const float inverse = 1.0f / pixels;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < images; i++) {
        float *restrict sum = sums + i * channels;
        bf16 *restrict to = squeezed + i * channels;
        EACH_CHANNEL {
            sum[c] = sum[c] * inverse - mean[c];
            to[c] = to_bf16(beta[c] + sum[c] * scale[c]);
        }
    }
}

/* gate = sigmoid(excited + bias), excited bfloat16; and the affine map that it, stochastic depth and the batch norm make
 * together of each image. */
void gate_open(const bf16 *excited, const float *bias, const float *keep, int64_t images, int64_t channels,
               const float *scale, const float *shift, float *gate, float *gain, float *offset, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < images; i++) {
        const float kept = keep ? keep[i] : 1.0f;
        float *restrict g = gain + i * channels, *restrict o = offset + i * channels;
        if (gate) {
            const bf16 *restrict from = excited + i * channels;
            float *restrict opened = gate + i * channels;
            EACH_CHANNEL {
                opened[c] = 1.0f / (1.0f + exponential(-(from_bf16(from[c]) + bias[c])));
                g[c] = opened[c] * kept * scale[c];
                o[c] = opened[c] * kept * shift[c];
            }
        } else
            EACH_CHANNEL g[c] = kept * scale[c], o[c] = kept * shift[c];
    }
}

/* From total and product, an image's sums of g, the gradient past the gate, and of g * (x - mean): that of `excited`,
 * bfloat16, and of the bias. */
void gate_excited_gradient(const float *total, const float *product, const float *gate, const float *keep, int64_t images,
                           int64_t channels, const float *scale, const float *beta, bf16 *excited, float *bias,
                           int64_t threads) {
    float *parts = calloc(threads * channels, sizeof(float));
    if (!parts) abort();
#pragma omp parallel num_threads(threads)
    {
        float *restrict mine = parts + omp_get_thread_num() * channels;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < images; i++) {
            const float kept = keep ? keep[i] : 1.0f;
            const float *restrict t = total + i * channels, *restrict p = product + i * channels;
            const float *restrict opened = gate + i * channels;
            bf16 *restrict to = excited + i * channels;
            EACH_CHANNEL {
                const float g = (beta[c] * t[c] + scale[c] * p[c]) * kept * opened[c] * (1.0f - opened[c]);
                to[c] = to_bf16(g);
                mine[c] += g;
            }
        }
    }
    memset(bias, 0, channels * sizeof(float));
    for (int64_t t = 0; t < threads; t++)
        EACH_CHANNEL bias[c] += parts[t * channels + c];
    free(parts);
}

/* The sums of the batch norm over all images, and from them the gradient of its input x, g * gain + offset + x * slope.
 * spread: the gradient of `squeezed`, bfloat16. rows: images * pixels. */
void gate_gradient(const float *total, const float *product, const float *gate, const float *keep, const bf16 *spread,
                   const float *centred, int64_t images, int64_t channels, int64_t pixels, const float *mean,
                   const float *deviation, const float *scale, float *sums, float *products, float *gain,
                   float *offset, float *slope, int64_t threads) {
    float *parts = calloc(threads * 2 * channels, sizeof(float));
    if (!parts) abort();
    const float inverse = 1.0f / pixels, inverse_rows = 1.0f / (images * pixels);
#pragma omp parallel num_threads(threads)
    {
        float *restrict s = parts + omp_get_thread_num() * 2 * channels, *restrict q = s + channels;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < images; i++) {
            const float kept = keep ? keep[i] : 1.0f;
            const float *restrict t = total + i * channels, *restrict p = product + i * channels;
            if (gate) {
                const float *restrict opened = gate + i * channels, *restrict x = centred + i * channels;
                const bf16 *restrict more = spread + i * channels;
                EACH_CHANNEL {
                    const float g = opened[c] * kept, m = from_bf16(more[c]);
                    s[c] += g * t[c] + m;
                    q[c] += g * p[c] + m * x[c];
                }
            } else
                EACH_CHANNEL s[c] += kept * t[c], q[c] += kept * p[c];
        }
#pragma omp single
        {
            memset(sums, 0, channels * sizeof(float));
            memset(products, 0, channels * sizeof(float));
            for (int64_t t = 0; t < threads; t++)
                EACH_CHANNEL {
                    sums[c] += parts[2 * t * channels + c];
                    products[c] += parts[(2 * t + 1) * channels + c];
                }
            EACH_CHANNEL slope[c] = -scale[c] * deviation[c] * deviation[c] * products[c] * inverse_rows;
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < images; i++) {
            const float kept = keep ? keep[i] : 1.0f;
            float *restrict g = gain + i * channels, *restrict o = offset + i * channels;
            EACH_CHANNEL {
                g[c] = kept * scale[c];
                o[c] = -sums[c] * inverse_rows * scale[c] - slope[c] * mean[c];
            }
            if (gate) {
                const float *restrict opened = gate + i * channels;
                const bf16 *restrict more = spread + i * channels;
                EACH_CHANNEL {
                    g[c] *= opened[c];
                    o[c] += from_bf16(more[c]) * inverse * scale[c];
                }
            }
        }
    }
    free(parts);
}

#endif
