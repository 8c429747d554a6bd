/* What the tests share: a check that tells where it failed, and objects. */
#ifndef COMMON_H
#define COMMON_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kinglet.h"

#define CHECK(what) check((what), #what, __FILE__, __LINE__)
#define STATUS(expected, call) status((expected), (call), #call, __FILE__, __LINE__)
#define OK(call) STATUS(KINGLET_OK, call)

static inline void check(int good, const char *what, const char *file, int line) {
    if (!good) {
        fprintf(stderr, "%s:%d: %s\n  last error: %s\n", file, line, what, kinglet_error_last());
        abort();
    }
}

static inline void status(kinglet_status expected, kinglet_status found, const char *what, const char *file, int line) {
    if (found != expected) {
        fprintf(stderr, "%s:%d: expected %s, found %s\n", file, line, kinglet_status_name(expected),
                kinglet_status_name(found));
        check(0, what, file, line);
    }
}

static inline kinglet_model *load(kinglet_runtime *runtime, const char *path) {
    kinglet_model *model;
    kinglet_model_params params = {sizeof params, 0, 0, 2, 0, 0, NULL, 0, 0};
    OK(kinglet_model_load(&model, runtime, path, strlen(path), &params));
    return model;
}

static inline kinglet_session *open_session(kinglet_model *model) {
    kinglet_session *session;
    kinglet_session_params params = {sizeof params, 2048, 0, 0, 0, 0};
    OK(kinglet_session_create(&session, model, &params));
    OK(kinglet_session_set(session, "temp", 4, "0", 1)); /* the likeliest token, so that runs compare */
    return session;
}

/* Text that grows, as a callback's `user`. */
typedef struct text {
    char bytes[1 << 16];
    size_t len;
    size_t n_chunks;
    size_t stop_after; /* chunks of text; 0: never */
} text;

static inline int append(const kinglet_chunk *chunk, void *user) {
    text *to = (text *)user;
    if (chunk->kind != KINGLET_CHUNK_TEXT) return 0;
    CHECK(to->len + chunk->text_len <= sizeof to->bytes);
    memcpy(to->bytes + to->len, chunk->text, chunk->text_len);
    to->len += chunk->text_len;
    to->n_chunks++;
    return to->n_chunks == to->stop_after;
}

static inline int same(const text *a, const text *b) {
    return a->len == b->len && memcmp(a->bytes, b->bytes, a->len) == 0;
}

#endif
