/* How soon work ends that is cancelled, at random instants of loading, prefill and decode, and what is left of it: nothing.
 * Sessions of one model on many threads, each of which comes to what it comes to alone, whatever else is done to the model
 * and its runtime. Usage: bounds MODEL CANCELS BOUND-MS THREADS TOKENS [least]
 * With the last word the model is loaded in the least memory that does: experts are read when they are used. */
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

/* Loading, cancelled `after` ms: how long it went on, or less than 0 if it had ended before. */
static double cut_loading(kinglet_runtime *runtime, const char *path, double after) {
    stopper s = {NULL, after, 0};
    pthread_t thread;
    kinglet_model *model;
    kinglet_model_params params = {sizeof params, 0, 0, 2, 0, 0, NULL, 0, 0};
    OK(kinglet_cancel_create(&s.cancel));
    params.cancel = s.cancel;
    CHECK(pthread_create(&thread, NULL, stop, &s) == 0);
    kinglet_status status = kinglet_model_load(&model, runtime, path, strlen(path), &params);
    CHECK(status == KINGLET_OK || status == KINGLET_E_CANCELLED);
    double ended = now();
    kinglet_model_release(model);
    CHECK(pthread_join(thread, NULL) == 0);
    kinglet_cancel_release(s.cancel);
    return status == KINGLET_OK ? -1 : ended > s.asked ? ended - s.asked : 0;
}

/* The same of any piece of work. */
static double cut(bench *b, phase phase, double after) {
    if (phase == LOAD) return cut_loading(b->runtime, b->path, after);
    stopper s = {NULL, after, 0};
    pthread_t thread;
    kinglet_session *session;
    kinglet_reply said = {sizeof said, 0, 0, 0, 0, 0, 0, 0, 0};
    OK(kinglet_cancel_create(&s.cancel));
    session = open_session(b->model);
    CHECK(pthread_create(&thread, NULL, stop, &s) == 0);
    reply(session, phase == PREFILL ? b->prompt : "Once", phase == PREFILL ? 1 : 100000, s.cancel, &said);
    double ended = now();
    CHECK(pthread_join(thread, NULL) == 0);
    int was_cut = said.finish == KINGLET_FINISH_CANCELLED;
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

/* What an app does meanwhile, until it is told to stop. */
typedef struct disturber {
    kinglet_runtime *runtime;
    kinglet_model *model;
    const char *path;
    uint64_t memory; /* a budget, if the model has one */
    kinglet_cancel *stop; /* set: enough */
    int n;
} disturber;

static int nothing(const kinglet_chunk *chunk, void *user) {
    CHECK(chunk->kind != KINGLET_CHUNK_END || ++*(int *)user == 1);
    return 0;
}

static void *disturb(void *user) {
    static const kinglet_event events[] = {KINGLET_EVENT_LOW_MEMORY, KINGLET_EVENT_BACKGROUND, KINGLET_EVENT_FOREGROUND,
                                           KINGLET_EVENT_THERMAL_SERIOUS, KINGLET_EVENT_THERMAL_NOMINAL};
    disturber *d = (disturber *)user;
    uint64_t seed = 362436069;
    kinglet_session *session = open_session(d->model);
    kinglet_embed_params until = {sizeof until, 0, 0, d->stop};
    kinglet_generate_params params = {sizeof params, 6, NULL, 0, 1, 0, NULL, NULL, 0, NULL, 0};
    kinglet_model_info info = {sizeof info, 0, 0, 0, 0, 0, 0, 0, 0};
    OK(kinglet_model_describe(d->model, &info));
    float *vector = (float *)malloc(info.hidden * sizeof *vector);
    for (d->n = 0;; d->n++) {
        uint32_t tokens[16];
        size_t n;
        uint64_t freed;
        OK(kinglet_runtime_notify(d->runtime, events[d->n % 5]));
        OK(kinglet_model_trim(d->model, (uint64_t)(1e6 * chance(&seed)), &freed));
        STATUS(d->memory ? KINGLET_OK : KINGLET_E_ARGUMENT, kinglet_model_set_memory(d->model, d->memory));
        OK(kinglet_model_tokenize(d->model, "a fox", 5, 0, tokens, 16, &n));
        cut_loading(d->runtime, d->path, 20 * chance(&seed));
        int n_ends = 0;
        kinglet_request *request;
        OK(kinglet_request_start(&request, session, "And a bird?", 11, &params, nothing, &n_ends));
        if (chance(&seed) < 0.5) OK(kinglet_request_cancel(request));
        if (chance(&seed) < 0.5) {
            kinglet_status expected = info.has_chat_template ? KINGLET_OK : KINGLET_E_TEMPLATE;
            STATUS(expected, kinglet_request_wait(request, 600000, NULL));
        }
        kinglet_request_release(request);
        CHECK(n_ends == 1);
        if (info.has_chat_template) OK(kinglet_session_rewind(session, 0));
        kinglet_status embedded = kinglet_session_embed(session, "a fox", 5, &until, vector, info.hidden, &n);
        if (embedded == KINGLET_E_CANCELLED) break;
        STATUS(KINGLET_OK, embedded);
    }
    OK(kinglet_runtime_notify(d->runtime, KINGLET_EVENT_THERMAL_NOMINAL));
    kinglet_session_release(session);
    free(vector);
    return NULL;
}

static void threads(disturber *d, int n, int n_tokens) {
    static worker workers[MOST];
    kinglet_model *model = d->model;
    pthread_t all[MOST], other;
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
    OK(kinglet_cancel_create(&d->stop));
    CHECK(pthread_create(&other, NULL, disturb, d) == 0);
    for (int i = 0; i < n; i++) CHECK(pthread_create(&all[i], NULL, work, &workers[i]) == 0);
    for (int i = 0; i < n; i++) {
        CHECK(pthread_join(all[i], NULL) == 0);
        n_cuts += workers[i].n_cuts;
    }
    OK(kinglet_cancel_set(d->stop));
    CHECK(pthread_join(other, NULL) == 0);
    kinglet_cancel_release(d->stop);
    uint64_t freed = 0;
    OK(kinglet_model_trim(model, UINT64_MAX, &freed));
    CHECK((freed > 0) == (d->memory > 0)); /* experts that were read when they were used */
    printf("%d sessions on %d threads, %d tokens each, disturbed %d times: %d cut short, all as alone, %.1f s\n", n, n,
           n_tokens, d->n, n_cuts, (now() - began) / 1e3);
}

/* A model in the least memory that does, more or less: what the program takes grows meanwhile. */
static kinglet_model *load_least(bench *b) {
    kinglet_model_params params = {sizeof params, 0, 1, 2, 0, 0, NULL, 0, 0};
    size_t len = strlen(b->path);
    uint64_t too_little = 0;
    kinglet_plan plan;
    kinglet_model *model;
    memset(&plan, 0, sizeof plan);
    plan.struct_size = sizeof plan;
    OK(kinglet_plan_make(&plan, b->path, len, NULL, NULL));
    uint64_t enough = 2 * plan.total;
    while (enough - too_little > 65536) {
        params.memory = (enough + too_little) / 2;
        kinglet_status status = kinglet_plan_make(&plan, b->path, len, &params, NULL);
        CHECK(status == KINGLET_OK || status == KINGLET_E_BUDGET);
        *(status == KINGLET_OK ? &enough : &too_little) = params.memory;
    }
    for (params.memory = enough;; params.memory += 65536) {
        kinglet_status status = kinglet_model_load(&model, b->runtime, b->path, len, &params);
        if (status == KINGLET_OK) return model;
        CHECK(status == KINGLET_E_BUDGET);
    }
}

int main(int argc, char **argv) {
    CHECK(argc == 6 || argc == 7);
    setvbuf(stdout, NULL, _IOLBF, BUFSIZ);
    int n = atoi(argv[2]);
    double bound = atof(argv[3]);
    bench b = {NULL, argv[1], NULL, "", {"", 0, 0, 0}};
    OK(kinglet_runtime_create(&b.runtime));
    kinglet_model_release(load(b.runtime, b.path)); /* the file is in memory now */
    double began = now();
    b.model = load(b.runtime, b.path);
    double loading = now() - began;
    disturber d = {b.runtime, b.model, b.path, 0, NULL, 0};
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
    if (argc == 7) {
        d.model = load_least(&b);
        d.memory = UINT64_C(8) << 30; /* for sessions: experts come as they are used, and leave when they are trimmed */
        OK(kinglet_model_set_memory(d.model, d.memory));
    }
    threads(&d, atoi(argv[4]), atoi(argv[5]));
    if (d.model != b.model) kinglet_model_release(d.model);
    kinglet_model_release(b.model);
    kinglet_runtime_release(b.runtime);
    return 0;
}
