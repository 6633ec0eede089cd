/* The passes for one element type: included by passes.c once for each, with
 *   T          the type in memory
 *   LOAD(t)    its value as float
 *   STORE(f)   a float rounded to it
 *   NAME(n)    the name of a function for it
 *
 * Maps are channels_last: (rows, channels) in memory, a row a pixel. All arithmetic is in float.
 */

/* Mean and biased variance of each channel, in one pass over memory; and the sum of each segment of `segment` rows
 * (the last may be shorter), (segments, channels), which for rows of one image is its squeeze.
 *
 * A block of rows that fits the cache is read twice: for its sum, then for its squares about its own mean. Blocks join by
 * Chan, Golub & LeVeque's formula, so that no square of a large mean is ever subtracted from another.
 * scratch: threads * 4 * channels floats.
 */
void NAME(statistics)(const T *restrict x, int64_t rows, int64_t channels, int64_t segment, float *restrict sums,
                      float *restrict mean, float *restrict variance, float *restrict scratch, int64_t threads) {
    const int64_t segments = (rows + segment - 1) / segment;
    int64_t counts[threads];
    memset(counts, 0, sizeof counts);
#pragma omp parallel num_threads(threads)
    {
        const int me = omp_get_thread_num();
        float *restrict block_sum = scratch + me * 4 * channels, *restrict squares = block_sum + channels;
        float *restrict my_mean = squares + channels, *restrict my_squares = my_mean + channels;
        int64_t count = 0;
        memset(my_mean, 0, 2 * channels * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t s = 0; s < segments; s++) {
            const int64_t end = (s + 1) * segment < rows ? (s + 1) * segment : rows;
            float *restrict sum = sums + s * channels;
            memset(sum, 0, channels * sizeof(float));
            for (int64_t start = s * segment; start < end; start += BLOCK_ROWS) {
                const int64_t n = end - start < BLOCK_ROWS ? end - start : BLOCK_ROWS;
                const T *restrict block = x + start * channels;
                memset(block_sum, 0, 2 * channels * sizeof(float));
                for (int64_t r = 0; r < n; r++)
                    EACH_CHANNEL block_sum[c] += LOAD(block[r * channels + c]);
                const float inverse = 1.0f / n, share = (float)n / (count + n), weight = (float)count * share;
                for (int64_t r = 0; r < n; r++)
                    EACH_CHANNEL {
                        const float d = LOAD(block[r * channels + c]) - block_sum[c] * inverse;
                        squares[c] += d * d;
                    }
                EACH_CHANNEL {
                    const float d = block_sum[c] * inverse - my_mean[c];
                    my_mean[c] += d * share;
                    my_squares[c] += squares[c] + d * d * weight;
                    sum[c] += block_sum[c];
                }
                count += n;
            }
        }
        counts[me] = count;
    }
    memset(mean, 0, channels * sizeof(float));
    memset(variance, 0, channels * sizeof(float));
    int64_t count = 0;
    for (int t = 0; t < threads; t++) {
        if (!counts[t]) continue;
        const float *restrict their_mean = scratch + t * 4 * channels + 2 * channels;
        const float *restrict their_squares = their_mean + channels;
        const float share = (float)counts[t] / (count + counts[t]), weight = (float)count * share;
        EACH_CHANNEL {
            const float d = their_mean[c] - mean[c];
            mean[c] += d * share;
            variance[c] += their_squares[c] + d * d * weight;
        }
        count += counts[t];
    }
    EACH_CHANNEL variance[c] /= count;
}

/* y = x * scale + shift by channel; with relu, its positive part (NaN stays). */
void NAME(affine)(const T *restrict x, int64_t rows, int64_t channels, const float *restrict scale,
                  const float *restrict shift, int64_t relu, T *restrict y, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        const T *restrict in = x + r * channels;
        T *restrict out = y + r * channels;
        if (relu)
            EACH_CHANNEL {
                const float v = LOAD(in[c]) * scale[c] + shift[c];
                out[c] = STORE(v < 0 ? 0.0f : v);
            }
        else
            EACH_CHANNEL out[c] = STORE(LOAD(in[c]) * scale[c] + shift[c]);
    }
}

/* Of g = dy where affine's y is positive (all of dy without relu): the sums over rows of g and of g * (x - mean).
 * scratch: threads * 2 * channels floats.
 */
void NAME(affine_sums)(const T *restrict dy, const T *restrict x, int64_t rows, int64_t channels,
                       const float *restrict scale, const float *restrict shift, const float *restrict mean, int64_t relu,
                       float *restrict sum, float *restrict product, float *restrict scratch, int64_t threads) {
    memset(scratch, 0, threads * 2 * channels * sizeof(float));
#pragma omp parallel num_threads(threads)
    {
        float *restrict s = scratch + omp_get_thread_num() * 2 * channels, *restrict p = s + channels;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            const T *restrict g_row = dy + r * channels, *restrict x_row = x + r * channels;
            if (relu)
                EACH_CHANNEL {
                    const float v = LOAD(x_row[c]), g = v * scale[c] + shift[c] <= 0 ? 0.0f : LOAD(g_row[c]);
                    s[c] += g;
                    p[c] += g * (v - mean[c]);
                }
            else
                EACH_CHANNEL {
                    const float g = LOAD(g_row[c]);
                    s[c] += g;
                    p[c] += g * (LOAD(x_row[c]) - mean[c]);
                }
        }
    }
    add_up(scratch, threads, channels, sum, product);
}

/* dx = scale * g + constant + slope * (x - mean), g as above. */
void NAME(affine_gradient)(const T *restrict dy, const T *restrict x, int64_t rows, int64_t channels,
                           const float *restrict scale, const float *restrict shift, const float *restrict mean,
                           const float *restrict constant, const float *restrict slope, int64_t relu, T *restrict dx,
                           int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        const T *restrict g_row = dy + r * channels, *restrict x_row = x + r * channels;
        T *restrict out = dx + r * channels;
        if (relu)
            EACH_CHANNEL {
                const float v = LOAD(x_row[c]), g = v * scale[c] + shift[c] <= 0 ? 0.0f : LOAD(g_row[c]);
                out[c] = STORE(scale[c] * g + constant[c] + slope[c] * (v - mean[c]));
            }
        else
            EACH_CHANNEL
                out[c] = STORE(scale[c] * LOAD(g_row[c]) + constant[c] + slope[c] * (LOAD(x_row[c]) - mean[c]));
    }
}

/* y = relu(shortcut + x * scale + shift), scale and shift (images, channels). */
void NAME(epilogue)(const T *restrict x, const T *restrict shortcut, int64_t images, int64_t pixels, int64_t channels,
                const float *restrict scale, const float *restrict shift, T *restrict y, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < images * pixels; r++) {
        const float *restrict a = scale + r / pixels * channels, *restrict b = shift + r / pixels * channels;
        const T *restrict in = x + r * channels, *restrict other = shortcut + r * channels;
        T *restrict out = y + r * channels;
        EACH_CHANNEL {
            const float v = LOAD(other[c]) + (LOAD(in[c]) * a[c] + b[c]);
            out[c] = STORE(v < 0 ? 0.0f : v);
        }
    }
}

/* Of g = dy where y is positive: for each image the sums over its pixels of g and of g * (x - mean). */
void NAME(epilogue_sums)(const T *restrict dy, const T *restrict y, const T *restrict x, int64_t images, int64_t pixels,
                     int64_t channels, const float *restrict mean, float *restrict sum, float *restrict product,
                     int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < images; n++) {
        float *restrict s = sum + n * channels, *restrict p = product + n * channels;
        memset(s, 0, channels * sizeof(float));
        memset(p, 0, channels * sizeof(float));
        for (int64_t r = n * pixels; r < (n + 1) * pixels; r++) {
            const T *restrict g_row = dy + r * channels, *restrict y_row = y + r * channels;
            const T *restrict x_row = x + r * channels;
            EACH_CHANNEL {
                const float g = LOAD(y_row[c]) <= 0 ? 0.0f : LOAD(g_row[c]);
                s[c] += g;
                p[c] += g * (LOAD(x_row[c]) - mean[c]);
            }
        }
    }
}

/* dshortcut = g, and dx = a * g + b + slope * (x - mean), a and b (images, channels). */
void NAME(epilogue_gradient)(const T *restrict dy, const T *restrict y, const T *restrict x, int64_t images, int64_t pixels,
                         int64_t channels, const float *restrict mean, const float *restrict scale,
                         const float *restrict constant, const float *restrict slope, T *restrict dx,
                         T *restrict dshortcut, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < images * pixels; r++) {
        const float *restrict a = scale + r / pixels * channels, *restrict b = constant + r / pixels * channels;
        const T *restrict g_row = dy + r * channels, *restrict y_row = y + r * channels;
        const T *restrict x_row = x + r * channels;
        T *restrict out = dx + r * channels, *restrict other = dshortcut + r * channels;
        EACH_CHANNEL {
            const float g = LOAD(y_row[c]) <= 0 ? 0.0f : LOAD(g_row[c]);
            other[c] = STORE(g);
            out[c] = STORE(a[c] * g + b[c] + slope[c] * (LOAD(x_row[c]) - mean[c]));
        }
    }
}
