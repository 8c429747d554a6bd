/* How soon work ends that is cancelled, at random instants of loading, prefill and decode, and what is left of it: nothing.
 * Sessions of one model on many threads, each of which comes to what it comes to alone.
 * Usage: bounds MODEL CANCELS BOUND-MS THREADS TOKENS */
#define _DEFAULT_SOURCE
#include "clock.h"
#include "common.h"

#include <malloc.h>
#include <pthread.h>
#include <unistd.h>

#define MOST 64

static double chance(uint64_t *seed) {
    *seed ^= *seed << 13, *seed ^= *seed >> 7, *seed ^= *seed << 17;
    return (double)(*seed % 100000) / 100000;
}

/* Bytes of this process that no file has; and those of them that malloc has given and not taken back: what it has taken
 * back it may keep, some MiB more or less. */
static double anonymous(double *in_use) {
    long pages = 0, shared = 0;
    nap(20); /* threads that are ending have ended */
    malloc_trim(0);
    struct mallinfo2 now = mallinfo2();
    *in_use = (double)now.uordblks + (double)now.hblkhd;
    FILE *file = fopen("/proc/self/statm", "r");
    CHECK(file != NULL && fscanf(file, "%*d %ld %ld", &pages, &shared) == 2);
    fclose(file);
    return (double)(pages - shared) * (double)sysconf(_SC_PAGESIZE);
}

typedef enum phase { LOAD, PREFILL, DECODE } phase;

typedef struct bench {
    kinglet_runtime *runtime;
    const char *path;
    kinglet_model *model;
    char prompt[4096];
    text expected;
} bench;

static text found;

static void reply(kinglet_session *session, const char *prompt, uint64_t n, kinglet_cancel *cancel,
                  kinglet_reply *out) {
    kinglet_generate_params params = {sizeof params, n, NULL, 0, 1, 0, cancel, NULL, 0, NULL, 0};
    memset(&found, 0, sizeof found);
    OK(kinglet_session_complete(session, prompt, strlen(prompt), &params, out, append, &found));
}

/* One piece of work, cancelled `after` ms: how long it went on, or less than 0 if it had ended before. */
static double cut(bench *b, phase phase, double after) {
    stopper s = {NULL, after, 0};
    pthread_t thread;
    kinglet_session *session = NULL;
    kinglet_reply said = {sizeof said, 0, 0, 0, 0, 0, 0, 0, 0};
    int was_cut;
    OK(kinglet_cancel_create(&s.cancel));
    if (phase != LOAD) session = open_session(b->model);
    CHECK(pthread_create(&thread, NULL, stop, &s) == 0);
    if (phase == LOAD) {
        kinglet_model *model;
        kinglet_model_params params = {sizeof params, 0, 0, 2, 0, 0, s.cancel};
        kinglet_status status = kinglet_model_load(&model, b->runtime, b->path, strlen(b->path), &params);
        CHECK(status == KINGLET_OK || status == KINGLET_E_CANCELLED);
        was_cut = status == KINGLET_E_CANCELLED;
        double ended = now();
        kinglet_model_release(model);
        CHECK(pthread_join(thread, NULL) == 0);
        kinglet_cancel_release(s.cancel);
        return was_cut && ended > s.asked ? ended - s.asked : was_cut ? 0 : -1;
    }
    reply(session, phase == PREFILL ? b->prompt : "Once", phase == PREFILL ? 1 : 100000, s.cancel, &said);
    double ended = now();
    CHECK(pthread_join(thread, NULL) == 0);
    was_cut = said.finish == KINGLET_FINISH_CANCELLED;
    kinglet_cancel_release(s.cancel);
    /* What comes next, in the same session, is what a fresh one says. */
    if ((int)after % 4 == 0) {
        reply(session, b->prompt, 8, NULL, NULL);
        CHECK(same(&found, &b->expected));
    }
    kinglet_session_release(session);
    return was_cut && ended > s.asked ? ended - s.asked : was_cut ? 0 : -1;
}

static void cancels(bench *b, phase phase, int n, double span, double bound) {
    static const char *names[] = {"load", "prefill", "decode"};
    double *waits = (double *)malloc((size_t)n * sizeof *waits), base = 0, base_in_use = 0, in_use;
    uint64_t seed = 88172645463325252u;
    int n_cut = 0, n_warm = n / 5;
    for (int i = 0; i < n; i++) {
        if (i == n_warm) base = anonymous(&base_in_use); /* threads, pools and caches are there now */
        double wait = cut(b, phase, span * chance(&seed));
        if (wait >= 0) waits[n_cut++] = wait;
    }
    double grown = anonymous(&in_use) - base;
    CHECK(n_cut > n / 8);
    qsort(waits, (size_t)n_cut, sizeof *waits, by_size);
    printf("cancel in %s: %d of %d, ms: median %.2f, 95 %% %.2f, 99 %% %.2f, most %.2f; in use %+.2f, memory %+.2f MiB\n", names[phase],
           n_cut, n, waits[n_cut / 2], waits[n_cut * 95 / 100], waits[n_cut * 99 / 100], waits[n_cut - 1],
           (in_use - base_in_use) / 1048576, grown / 1048576);
    CHECK(waits[n_cut * 9 / 10] < bound);
    CHECK(in_use - base_in_use < 1048576);
    CHECK(grown < 16 * 1048576.0);
    free(waits);
}

/* Many sessions at once. */
typedef struct worker {
    kinglet_model *model;
    int number, n_tokens, n_cuts;
    text alone;
} worker;

#define ROUND 96

typedef struct listener {
    text said;
    size_t n_tokens, stop_at;
} listener;

static int listen(const kinglet_chunk *chunk, void *user) {
    listener *to = (listener *)user;
    if (chunk->kind != KINGLET_CHUNK_TEXT) return 0;
    append(chunk, &to->said);
    return ++to->n_tokens == to->stop_at;
}

static void one_round(worker *w, kinglet_session *session, listener *to, kinglet_cancel *cancel) {
    char prompt[64];
    kinglet_generate_params params = {sizeof params, ROUND, NULL, 0, 1, 0, cancel, NULL, 0, NULL, 0};
    snprintf(prompt, sizeof prompt, "Number %d: once upon a time", w->number);
    to->said.len = to->n_tokens = 0;
    OK(kinglet_session_complete(session, prompt, strlen(prompt), &params, NULL, listen, to));
}

static void *work(void *user) {
    worker *w = (worker *)user;
    uint64_t seed = 88172645463325252u + (uint64_t)w->number * 7919;
    listener *to = (listener *)calloc(1, sizeof *to);
    kinglet_session *session = open_session(w->model);
    for (int done = 0; done < w->n_tokens;) {
        double what = chance(&seed);
        stopper s = {NULL, 30 * chance(&seed), 0};
        pthread_t thread;
        to->stop_at = what < 0.3 ? 1 + (size_t)(chance(&seed) * ROUND) : 0;
        if (what > 0.6) {
            OK(kinglet_cancel_create(&s.cancel));
            CHECK(pthread_create(&thread, NULL, stop, &s) == 0);
        }
        one_round(w, session, to, s.cancel);
        if (s.cancel != NULL) {
            CHECK(pthread_join(thread, NULL) == 0);
            kinglet_cancel_release(s.cancel);
        }
        /* As far as it came it is what it is alone; half a character at a cut may be missing or marked as such. */
        int whole = to->n_tokens == ROUND && to->stop_at == 0 && s.cancel == NULL;
        size_t sure = whole ? w->alone.len : to->said.len > 4 ? to->said.len - 4 : 0;
        CHECK(!whole || to->said.len == w->alone.len);
        CHECK(sure <= w->alone.len && memcmp(to->said.bytes, w->alone.bytes, sure) == 0);
        w->n_cuts += !whole;
        done += (int)to->n_tokens + 1;
        if (chance(&seed) < 0.2) {
            kinglet_session *fork;
            OK(kinglet_session_fork(&fork, session));
            kinglet_session_release(session);
            session = fork;
        }
    }
    kinglet_session_release(session);
    free(to);
    return NULL;
}

static void threads(kinglet_model *model, int n, int n_tokens) {
    static worker workers[MOST];
    pthread_t all[MOST];
    int n_cuts = 0;
    CHECK(n <= MOST);
    listener *to = (listener *)calloc(1, sizeof *to);
    for (int i = 0; i < n; i++) {
        kinglet_session *session = open_session(model);
        workers[i].model = model;
        workers[i].number = i;
        workers[i].n_tokens = n_tokens;
        one_round(&workers[i], session, to, NULL);
        workers[i].alone = to->said;
        kinglet_session_release(session);
    }
    free(to);
    double began = now();
    for (int i = 0; i < n; i++) CHECK(pthread_create(&all[i], NULL, work, &workers[i]) == 0);
    for (int i = 0; i < n; i++) {
        CHECK(pthread_join(all[i], NULL) == 0);
        n_cuts += workers[i].n_cuts;
    }
    printf("%d sessions on %d threads, %d tokens each: %d cut short, all as alone, %.1f s\n", n, n, n_tokens, n_cuts,
           (now() - began) / 1e3);
}

int main(int argc, char **argv) {
    CHECK(argc == 6);
    setvbuf(stdout, NULL, _IOLBF, BUFSIZ);
    int n = atoi(argv[2]);
    double bound = atof(argv[3]);
    bench b = {NULL, argv[1], NULL, "", {"", 0, 0, 0}};
    OK(kinglet_runtime_create(&b.runtime));
    kinglet_model_release(load(b.runtime, b.path)); /* the file is in memory now */
    double began = now();
    b.model = load(b.runtime, b.path);
    double loading = now() - began;
    if (n > 0) {
        for (int i = 0; i < 150; i++) strcat(b.prompt, "a fox and a small bird ");
        kinglet_session *session = open_session(b.model);
        began = now();
        reply(session, b.prompt, 8, NULL, NULL);
        double reading = now() - began;
        b.expected = found;
        kinglet_session_release(session);
        cancels(&b, LOAD, n, loading, bound);
        cancels(&b, PREFILL, n, reading, bound);
        cancels(&b, DECODE, n, 60, bound);
    }
    threads(b.model, atoi(argv[4]), atoi(argv[5]));
    kinglet_model_release(b.model);
    kinglet_runtime_release(b.runtime);
    return 0;
}
