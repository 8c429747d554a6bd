/* Conversations: streaming, stop, cancel, rewind, fork, save and load, requests, threads, events. Each comes to what a fresh
 * run comes to. Usage: chat MODEL FOLDER */
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>

#include "clock.h"
#include "common.h"

static const char QUESTION[] = "Describe a small café in Zürich.";
static kinglet_generate_params most(uint64_t n) {
    kinglet_generate_params params = {sizeof params, n, NULL, 0, 0, 0, NULL, NULL, 0, NULL, 0};
    params.ignore_end = 1;
    return params;
}

static void say(kinglet_session *session, const char *what, uint64_t n, text *into, kinglet_reply *reply) {
    kinglet_generate_params params = most(n);
    memset(into, 0, sizeof *into);
    if (reply) {
        memset(reply, 0, sizeof *reply);
        reply->struct_size = sizeof *reply;
    }
    OK(kinglet_session_send(session, what, strlen(what), &params, reply, append, into));
}

static text fresh, second, found;

static void history(kinglet_model *model, const char *folder) {
    char path[1024], json[64];
    kinglet_reply reply;
    kinglet_session *session = open_session(model), *fork, *loaded;
    say(session, QUESTION, 24, &fresh, &reply);
    CHECK(reply.reply_tokens == 24 && reply.finish == KINGLET_FINISH_LENGTH && fresh.len > 0);
    OK(kinglet_session_fork(&fork, session));
    say(session, "And then?", 16, &second, &reply);
    CHECK(reply.reused_tokens > 0 && reply.reused_tokens < reply.prompt_tokens);

    say(fork, "And then?", 16, &found, NULL);
    CHECK(same(&found, &second));
    kinglet_session_release(fork);

    OK(kinglet_session_rewind(session, 2));
    say(session, "And then?", 16, &found, NULL);
    CHECK(same(&found, &second));
    memset(&found, 0, sizeof found);
    kinglet_generate_params params = most(16);
    OK(kinglet_session_regenerate(session, &params, NULL, append, &found));
    CHECK(same(&found, &second));

    OK(kinglet_session_rewind(session, 2));
    snprintf(path, sizeof path, "%s/session.state", folder);
    OK(kinglet_session_save(session, path, strlen(path)));
    loaded = open_session(model);
    OK(kinglet_session_load(loaded, path, strlen(path)));
    say(loaded, "And then?", 16, &found, &reply);
    CHECK(same(&found, &second) && reply.reused_tokens > 0);
    remove(path);

    kinglet_buffer *buffer;
    const char *data;
    size_t len;
    OK(kinglet_session_messages(loaded, &buffer));
    OK(kinglet_buffer_data(buffer, &data, &len));
    CHECK(len > 40 && memcmp(data, "[{\"role\":\"user\",\"content\":\"Describe a small caf\xc3\xa9", 47) == 0);
    OK(kinglet_session_set_messages(session, data, len));
    kinglet_buffer_release(buffer);
    snprintf(json, sizeof json, "[]");
    OK(kinglet_session_set_messages(session, json, 2));
    say(session, QUESTION, 24, &found, NULL);
    CHECK(same(&found, &fresh));

    kinglet_text stop = {fresh.bytes + fresh.len / 2, 3};
    params = most(24);
    params.stops = &stop;
    params.n_stops = 1;
    memset(&found, 0, sizeof found);
    OK(kinglet_session_regenerate(session, &params, &reply, append, &found));
    CHECK(reply.finish == KINGLET_FINISH_STOP && found.len <= fresh.len / 2);
    CHECK(memcmp(found.bytes, fresh.bytes, found.len) == 0);

    memset(&found, 0, sizeof found);
    found.stop_after = 3;
    params = most(24);
    OK(kinglet_session_regenerate(session, &params, &reply, append, &found));
    CHECK(reply.finish == KINGLET_FINISH_CANCELLED && reply.reply_tokens == 3);

    memset(&found, 0, sizeof found);
    OK(kinglet_session_complete(session, "Once upon a time", 16, &params, &reply, append, &found));
    CHECK(reply.reply_tokens == 24 && found.len > 0);
    memset(&second, 0, sizeof second);
    OK(kinglet_session_complete(loaded, "Once upon a time", 16, &params, &reply, append, &second));
    CHECK(same(&found, &second));
    kinglet_session_release(loaded);
    kinglet_session_release(session);
}

static text calls;

static int append_calls(const kinglet_chunk *chunk, void *user) {
    if (chunk->kind != KINGLET_CHUNK_CALL) return append(chunk, user);
    memcpy(calls.bytes, chunk->text, chunk->text_len);
    return 0;
}

/* Replies that must be something, on this thread and on the runtime's. */
static void constraints(kinglet_model *model) {
    static const char schema[] = "{\"type\":\"object\",\"properties\":{\"sound\":{\"enum\":[\"m\xc3\xa4h\",\"woof\"]}},"
                                 "\"required\":[\"sound\"],\"additionalProperties\":false}";
    static const char grammar[] = "start: \"yes\" | \"no\"";
    kinglet_generate_params params = most(64);
    kinglet_session *session = open_session(model);
    kinglet_request *request;
    kinglet_reply reply = {sizeof reply, 0, 0, 0, 0, 0, 0, 0, 0};
    params.json_schema = schema;
    params.json_schema_len = sizeof schema - 1;
    memset(&found, 0, sizeof found);
    OK(kinglet_session_send(session, QUESTION, strlen(QUESTION), &params, &reply, append, &found));
    CHECK(reply.finish == KINGLET_FINISH_STOP && found.len > 10 && found.bytes[0] == '{');
    CHECK(strstr(found.bytes, "\"sound\"") != NULL && found.bytes[found.len - 1] == '}');
    CHECK(strstr(found.bytes, "\"m\xc3\xa4h\"") != NULL || strstr(found.bytes, "\"woof\"") != NULL);
    memset(&second, 0, sizeof second);
    OK(kinglet_session_regenerate(session, &params, NULL, append, &second));
    CHECK(same(&found, &second));
    params.json_schema_len = 0;
    /* A call of a tool, told apart from the text, and its answer. */
    static const char called[] = "start: \"Hm.<tool_call>{\\\"name\\\":\\\"sky\\\",\\\"arguments\\\":{\\\"x\\\":1}}</tool_call>\"";
    static const char tools[] = "[{\"type\":\"function\",\"function\":{\"name\":\"sky\"}}]";
    static const char answer[] = "[{\"role\":\"tool\",\"content\":\"blue\",\"tool_call_id\":\"call_0\"}]";
    params.grammar = called;
    params.grammar_len = sizeof called - 1;
    OK(kinglet_session_rewind(session, 0));
    OK(kinglet_session_set_tools(session, tools, sizeof tools - 1));
    memset(&found, 0, sizeof found);
    memset(&calls, 0, sizeof calls);
    OK(kinglet_session_send(session, "How is the sky?", 15, &params, &reply, append_calls, &found));
    CHECK(strcmp(found.bytes, "Hm.") == 0);
    CHECK(strcmp(calls.bytes, "{\"name\":\"sky\",\"arguments\":{\"x\":1}}") == 0);
    params.grammar_len = 0;
    params.max_tokens = 4;
    OK(kinglet_session_answer(session, answer, sizeof answer - 1, &params, &reply, append_calls, &found));
    CHECK(reply.reply_tokens == 4);
    OK(kinglet_session_set_tools(session, NULL, 0));
    params.max_tokens = 64;
    params.grammar = grammar;
    params.grammar_len = sizeof grammar - 1;
    memset(&found, 0, sizeof found);
    OK(kinglet_request_start(&request, session, "Is it?", 6, &params, append, &found));
    OK(kinglet_request_wait(request, 60000, NULL));
    kinglet_request_release(request);
    CHECK(strcmp(found.bytes, "yes") == 0 || strcmp(found.bytes, "no") == 0);
    kinglet_session_release(session);
}

/* Busy: from a callback, and while a request runs. */
static int calls_back(const kinglet_chunk *chunk, void *user) {
    (void)chunk;
    STATUS(KINGLET_E_BUSY, kinglet_session_rewind((kinglet_session *)user, 0));
    return 0;
}

static int at_the_end(const kinglet_chunk *chunk, void *user) {
    if (chunk->kind == KINGLET_CHUNK_END) *(int *)user = 1 + chunk->status;
    return 0;
}

static void requests(kinglet_model *model) {
    kinglet_session *session = open_session(model), *other = open_session(model);
    kinglet_request *request, *next;
    kinglet_generate_params params = most(4);
    int ended = 0, next_ended = 0;
    OK(kinglet_session_send(session, "Hello", 5, &params, NULL, calls_back, session));
    OK(kinglet_session_rewind(session, 0));

    params = most(24);
    memset(&found, 0, sizeof found);
    OK(kinglet_request_start(&request, session, QUESTION, strlen(QUESTION), &params, append, &found));
    STATUS(KINGLET_E_BUSY, kinglet_session_rewind(session, 0));
    STATUS(KINGLET_E_BUSY, kinglet_request_start(&next, session, "x", 1, NULL, NULL, NULL));
    CHECK(next == NULL);
    OK(kinglet_request_wait(request, 60000, NULL));
    CHECK(same(&found, &fresh));
    kinglet_request_release(request);

    params = most(1500); /* far more than there is time for */
    OK(kinglet_request_start(&request, session, QUESTION, strlen(QUESTION), &params, at_the_end, &ended));
    OK(kinglet_request_start(&next, other, QUESTION, strlen(QUESTION), &params, at_the_end, &next_ended));
    STATUS(KINGLET_E_TIMEOUT, kinglet_request_wait(request, 20, NULL));
    kinglet_session_release(session); /* it lives as long as it works */
    OK(kinglet_request_cancel(request));
    kinglet_reply reply = {sizeof reply, 0, 0, 0, 0, 0, 0, 0, 0};
    OK(kinglet_request_wait(request, 60000, &reply));
    CHECK(reply.finish == KINGLET_FINISH_CANCELLED && ended == 1 + KINGLET_OK);
    kinglet_request_release(request);
    kinglet_request_release(next); /* ends it, and waits for that */
    CHECK(next_ended == 1 + KINGLET_OK);
    kinglet_session_release(other);
}

/* Cancels at random instants, from another thread. */
/* `n` replies to a prompt of some 900 tokens, cancelled within `span` ms; the slowest must end within `bound`. */
static void cancels(kinglet_model *model, const char *name, int n, double from, double span, double bound) {
    static char prompt[8192];
    static double waits[4096];
    int n_cut = 0;
    uint64_t seed = 88172645463325252u;
    prompt[0] = 0;
    for (int i = 0; i < 150; i++) strcat(prompt, "a fox and a small bird ");
    kinglet_session *session = open_session(model);
    text expected;
    say(session, prompt, 6, &expected, NULL);
    for (int i = 0; i < n; i++) {
        kinglet_reply reply = {sizeof reply, 0, 0, 0, 0, 0, 0, 0, 0};
        kinglet_generate_params params = most(400);
        pthread_t thread;
        stopper s;
        seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
        s.after = from + span * (double)(seed % 1000) / 1000;
        OK(kinglet_cancel_create(&s.cancel));
        params.cancel = s.cancel;
        /* Nothing to go back to: the whole prompt is read. */
        kinglet_session_release(session);
        session = open_session(model);
        CHECK(pthread_create(&thread, NULL, stop, &s) == 0);
        OK(kinglet_session_send(session, prompt, strlen(prompt), &params, &reply, NULL, NULL));
        double ended = now();
        CHECK(pthread_join(thread, NULL) == 0);
        if (reply.finish == KINGLET_FINISH_CANCELLED && ended > s.asked) waits[n_cut++] = ended - s.asked;
        kinglet_cancel_release(s.cancel);
        OK(kinglet_session_rewind(session, 0));
        if (i % 4 == 0) {
            say(session, prompt, 6, &found, NULL);
            CHECK(same(&found, &expected));
        }
    }
    kinglet_session_release(session);
    CHECK(n_cut > n / 4);
    qsort(waits, (size_t)n_cut, sizeof *waits, by_size);
    printf("cancel in %s: %d of %d, ms: median %.2f, 95 %% %.2f, most %.2f\n", name, n_cut, n, waits[n_cut / 2],
           waits[n_cut * 95 / 100], waits[n_cut - 1]);
    CHECK(waits[n_cut * 9 / 10] < bound);
}

typedef struct worker {
    kinglet_model *model;
    int n;
} worker;

static void *work(void *user) {
    worker *w = (worker *)user;
    text got;
    for (int i = 0; i < w->n; i++) {
        kinglet_session *session = open_session(w->model);
        say(session, QUESTION, 24, &got, NULL);
        CHECK(same(&got, &fresh));
        kinglet_session_release(session);
        STATUS(KINGLET_E_HANDLE, kinglet_session_rewind(session, 0));
        CHECK(strstr(kinglet_error_last(), "session") != NULL);
    }
    return NULL;
}

static void threads(kinglet_runtime *runtime, kinglet_model *model) {
    pthread_t two[2];
    worker w = {model, 4};
    for (int i = 0; i < 2; i++) CHECK(pthread_create(&two[i], NULL, work, &w) == 0);
    /* What the system tells meanwhile changes no token. */
    for (int event = KINGLET_EVENT_LOW_MEMORY; event <= KINGLET_EVENT_THERMAL_CRITICAL; event++) {
        OK(kinglet_runtime_notify(runtime, (kinglet_event)event));
        nap(5);
    }
    OK(kinglet_runtime_notify(runtime, KINGLET_EVENT_THERMAL_NOMINAL));
    for (int i = 0; i < 2; i++) CHECK(pthread_join(two[i], NULL) == 0);
}

int main(int argc, char **argv) {
    CHECK(argc == 3 || argc == 4);
    int n = argc == 4 ? atoi(argv[3]) : 16;
    kinglet_runtime *runtime;
    OK(kinglet_runtime_create(&runtime));
    kinglet_model *model = load(runtime, argv[1]);
    history(model, argv[2]);
    constraints(model);
    requests(model);
    threads(runtime, model);
    /* Far above what it takes, for machines that are busy. */
    cancels(model, "prefill", n, 0, 60, 200);
    cancels(model, "decode", n, 250, 200, 200);
    kinglet_model_release(model);
    kinglet_runtime_release(runtime);
    return 0;
}
