/* SGD and the EMA of the weights over all tensors of a model, in one pass over memory: kernels/native/update.py calls
 * them. Threads divide the elements evenly, wherever a tensor begins or ends. */

#include <omp.h>
#include <stdint.h>

typedef struct {
    int64_t begin, end; /* none where end <= begin */
} range;

static int64_t sum(const int64_t *sizes, int64_t count) {
    int64_t total = 0;
    for (int64_t k = 0; k < count; k++) total += sizes[k];
    return total;
}

/* The elements of a tensor that this thread has, `before` elements being in the tensors before it. */
static range mine(int64_t before, int64_t size, int64_t total) {
    const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t begin = total * me / team - before, end = total * (me + 1) / team - before;
    return (range){begin > 0 ? begin : 0, end < size ? end : size};
}

/* As torch.lerp: exact where share is 0 or 1, and where both are equal. */
static inline float lerp(float from, float to, float share) {
    return share < 0.5f ? from + share * (to - from) : to - (to - from) * (1.0f - share);
}

/* addresses: (4, count) of parameters, gradients, momentum buffers and, with has_average, their EMA; float32.
 * sizes, decays: (count). numbers: learning rate, momentum, and the share of the new weights in the EMA. */
void update_sgd(const int64_t *addresses, const int64_t *sizes, const float *decays, const float *numbers, int64_t count,
                int64_t nesterov, int64_t has_average, int64_t threads) {
    const float rate = numbers[0], momentum = numbers[1], share = numbers[2];
    const int64_t total = sum(sizes, count);
#pragma omp parallel num_threads(threads)
    for (int64_t k = 0, before = 0; k < count; before += sizes[k], k++) {
        const range r = mine(before, sizes[k], total);
        float *restrict p = (float *)addresses[k], *restrict m = (float *)addresses[2 * count + k];
        float *restrict average = has_average ? (float *)addresses[3 * count + k] : 0;
        const float *restrict g = (const float *)addresses[count + k];
        const float decay = decays[k];
        for (int64_t i = r.begin; i < r.end; i++) {
            const float slope = decay ? g[i] + decay * p[i] : g[i]; /* 0 * infinity is not a number */
            const float velocity = momentum * m[i] + slope;
            const float now = p[i] - rate * (nesterov ? slope + momentum * velocity : velocity);
            m[i] = velocity;
            p[i] = now;
            if (average) average[i] = lerp(average[i], now, share);
        }
    }
}

/* addresses: (2, count) of the EMA and the parameters, float32. numbers: the share of the parameters. */
void update_average(const int64_t *addresses, const int64_t *sizes, const float *numbers, int64_t count, int64_t threads) {
    const float share = numbers[0];
    const int64_t total = sum(sizes, count);
#pragma omp parallel num_threads(threads)
    for (int64_t k = 0, before = 0; k < count; before += sizes[k], k++) {
        const range r = mine(before, sizes[k], total);
        float *restrict average = (float *)addresses[k];
        const float *restrict p = (const float *)addresses[count + k];
        for (int64_t i = r.begin; i < r.end; i++) average[i] = lerp(average[i], p[i], share);
    }
}
