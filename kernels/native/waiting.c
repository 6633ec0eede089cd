/* How the threads of GNU's OpenMP wait for each other: rsengine/waiting.py says why. */

#define _DEFAULT_SOURCE /* usleep */
#include <omp.h>
#include <pthread.h>
#include <stdint.h>
#include <unistd.h>

enum { NAP = 20000, MOST_MORE = 64 }; /* microseconds; threads */

static void *pass(void *gate) {
    pthread_mutex_lock(gate);
    pthread_mutex_unlock(gate);
    return NULL;
}

/* Whether the system lets this process have so many more threads at once. OpenMP would end the process where it does
 * not. */
static int can_have(int64_t more) {
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    pthread_t started[MOST_MORE];
    int64_t count = 0;
    pthread_mutex_lock(&gate); /* so that none ends before the last begins */
    while (count < more && !pthread_create(&started[count], NULL, pass, &gate)) count++;
    pthread_mutex_unlock(&gate);
    for (int64_t i = 0; i < count; i++) pthread_join(started[i], NULL);
    return count == more;
}

/* Until *ended keep a second team of sleeping threads, so large that with the `computing` ones there are more threads than
 * processors. OpenMP counts the processors that the process had when it was loaded. threads: not used. */
void waiting_shorten(int64_t computing, const int32_t *ended, int64_t threads) {
    const int64_t lacking = sysconf(_SC_NPROCESSORS_ONLN) - computing + 2, team = lacking < 2 ? 2 : lacking;
    (void)threads;
    if (team > MOST_MORE || !can_have(team)) return;
#pragma omp parallel num_threads(team)
    while (!__atomic_load_n(ended, __ATOMIC_ACQUIRE)) usleep(NAP);
}
