/* What the tests share that look at the clock: its time, and a thread that cancels something after a while. To be included
 * after a macro that asks for POSIX. */
#ifndef CLOCK_H
#define CLOCK_H

#include <time.h>

#include "common.h"

static double now(void) { /* ms */
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

static void nap(double ms) {
    struct timespec t = {(time_t)(ms / 1e3), (long)((ms - 1e3 * (double)(long)(ms / 1e3)) * 1e6)};
    nanosleep(&t, NULL);
}

typedef struct stopper {
    kinglet_cancel *cancel;
    double after, asked; /* ms from the start, and when it was */
} stopper;

static void *stop(void *user) {
    stopper *s = (stopper *)user;
    nap(s->after);
    s->asked = now();
    OK(kinglet_cancel_set(s->cancel));
    return NULL;
}

/* Of times, for qsort. */
static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

#endif
