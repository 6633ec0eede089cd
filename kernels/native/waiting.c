/* How the threads of GNU's OpenMP wait for each other: rsengine/waiting.py says why. */

#define _DEFAULT_SOURCE /* usleep */
#include <omp.h>
#include <stdint.h>
#include <unistd.h>

enum { NAP = 20000 }; /* microseconds */

/* Until *ended, besides the team of `computing` threads, one of so many that sleep that there are more threads than
 * processors. threads: not used. */
void waiting_shorten(int64_t computing, const int32_t *ended, int64_t threads) {
    const int64_t more = omp_get_num_procs() - computing + 2;
    (void)threads;
#pragma omp parallel num_threads(more < 2 ? 2 : more)
    while (!__atomic_load_n(ended, __ATOMIC_ACQUIRE)) usleep(NAP);
}
