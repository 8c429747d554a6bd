/* A chat in a terminal: chat MODEL.gguf */
#include <kinglet.h>

#include <signal.h>
#include <stdio.h>
#include <string.h>

static volatile sig_atomic_t interrupted;

static void interrupt(int signal) {
    (void)signal;
    interrupted = 1;
}

static int print(const kinglet_chunk *chunk, void *user) {
    (void)user;
    if (chunk->kind == KINGLET_CHUNK_TEXT) {
        fwrite(chunk->text, 1, chunk->text_len, stdout);
        fflush(stdout);
    }
    return interrupted; /* Ctrl-C ends the reply */
}

static int fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, kinglet_error_last());
    return 1;
}

int main(int argc, char **argv) {
    kinglet_runtime *runtime;
    kinglet_model *model;
    kinglet_session *session;
    char line[4096];

    if (argc != 2) {
        fprintf(stderr, "usage: %s MODEL.gguf\n", argv[0]);
        return 2;
    }
    if (kinglet_runtime_create(&runtime)) return fail("runtime");
    if (kinglet_model_load(&model, runtime, argv[1], strlen(argv[1]), NULL)) return fail("model");
    if (kinglet_session_create(&session, model, NULL)) return fail("session");
    kinglet_session_set(session, "repeat-penalty", 14, "1.1", 3);

    while (printf("> "), fflush(stdout), fgets(line, sizeof line, stdin)) {
        kinglet_reply reply = {0};
        reply.struct_size = sizeof reply;
        line[strcspn(line, "\n")] = 0;
        interrupted = 0;
        signal(SIGINT, interrupt);
        if (kinglet_session_send(session, line, strlen(line), NULL, &reply, print, NULL)) fail("reply");
        signal(SIGINT, SIG_DFL);
        printf("\n[%llu tokens, the first after %.0f ms]\n", (unsigned long long)reply.reply_tokens,
               (double)reply.first_token_ns * 1e-6);
    }
    kinglet_session_release(session);
    kinglet_model_release(model);
    kinglet_runtime_release(runtime);
    return 0;
}
