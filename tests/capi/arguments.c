/* Every function with each pointer null, sizes that are wrong, numbers out of range, handles that are stale or of another
 * kind: the documented status each time, and nothing else happens. Usage: arguments MODEL FOLDER MODEL-WITHOUT-TEMPLATE */
#define _POSIX_C_SOURCE 200809L /* open, pipe */
#include "common.h"

#include <fcntl.h>
#include <unistd.h>

static void releases(void) {
    char last[256];
    snprintf(last, sizeof last, "%s", kinglet_error_last());
    kinglet_buffer_release(NULL);
    kinglet_cancel_release(NULL);
    kinglet_runtime_release(NULL);
    kinglet_model_release(NULL);
    kinglet_session_release(NULL);
    kinglet_request_release(NULL);
    kinglet_profile_release(NULL);
    CHECK(strcmp(last, kinglet_error_last()) == 0);
}

static void null_handles(void) {
    const char *data;
    size_t len;
    kinglet_model_info model_info = {sizeof model_info, 0, 0, 0, 0, 0, 0, 0, 0};
    kinglet_session_info session_info = {sizeof session_info, 0, 0, 0, 0, 0, 0};
    kinglet_model *model = (kinglet_model *)&len;
    kinglet_session *session = (kinglet_session *)&len;
    kinglet_request *request = (kinglet_request *)&len;
    kinglet_buffer *buffer = (kinglet_buffer *)&len;
    STATUS(KINGLET_E_HANDLE, kinglet_buffer_data(NULL, &data, &len));
    STATUS(KINGLET_E_HANDLE, kinglet_cancel_set(NULL));
    STATUS(KINGLET_E_HANDLE, kinglet_runtime_notify(NULL, KINGLET_EVENT_LOW_MEMORY));
    STATUS(KINGLET_E_HANDLE, kinglet_model_load(&model, NULL, "x", 1, NULL));
    STATUS(KINGLET_E_HANDLE, kinglet_model_load_fd(&model, NULL, 0, 0, 0, NULL));
    STATUS(KINGLET_E_HANDLE, kinglet_model_describe(NULL, &model_info));
    STATUS(KINGLET_E_HANDLE, kinglet_model_name(NULL, &buffer));
    STATUS(KINGLET_E_HANDLE, kinglet_model_trim(NULL, 1, NULL));
    STATUS(KINGLET_E_HANDLE, kinglet_model_set_memory(NULL, 1));
    uint32_t token;
    float number;
    kinglet_profile *profile = (kinglet_profile *)&len;
    STATUS(KINGLET_E_HANDLE, kinglet_model_tokenize(NULL, "x", 1, 0, &token, 1, &len));
    STATUS(KINGLET_E_HANDLE, kinglet_model_detokenize(NULL, &buffer, &token, 0));
    STATUS(KINGLET_E_HANDLE, kinglet_session_set_tools(NULL, "[]", 2));
    STATUS(KINGLET_E_HANDLE, kinglet_session_answer(NULL, "[{\"role\":\"tool\"}]", 17, NULL, NULL, NULL, NULL));
    STATUS(KINGLET_E_HANDLE, kinglet_session_embed(NULL, "x", 1, NULL, &number, 1, &len));
    STATUS(KINGLET_E_HANDLE, kinglet_profile_json(NULL, &buffer));
    STATUS(KINGLET_E_HANDLE, kinglet_profile_trace(NULL, &buffer));
    STATUS(KINGLET_E_IO, kinglet_profile_make(&profile, "no such file", 12, NULL, NULL));
    CHECK(profile == NULL);
    STATUS(KINGLET_E_HANDLE, kinglet_session_create(&session, NULL, NULL));
    CHECK(model == NULL && buffer == NULL && session == NULL);
    STATUS(KINGLET_E_HANDLE, kinglet_session_describe(NULL, &session_info));
    STATUS(KINGLET_E_HANDLE, kinglet_session_set(NULL, "temp", 4, "0", 1));
    STATUS(KINGLET_E_HANDLE, kinglet_session_set_system(NULL, "x", 1));
    STATUS(KINGLET_E_HANDLE, kinglet_session_messages(NULL, &buffer));
    STATUS(KINGLET_E_HANDLE, kinglet_session_set_messages(NULL, "[]", 2));
    STATUS(KINGLET_E_HANDLE, kinglet_session_rewind(NULL, 0));
    STATUS(KINGLET_E_HANDLE, kinglet_session_send(NULL, "x", 1, NULL, NULL, NULL, NULL));
    STATUS(KINGLET_E_HANDLE, kinglet_session_regenerate(NULL, NULL, NULL, NULL, NULL));
    STATUS(KINGLET_E_HANDLE, kinglet_session_complete(NULL, "x", 1, NULL, NULL, NULL, NULL));
    STATUS(KINGLET_E_HANDLE, kinglet_session_fork(&session, NULL));
    STATUS(KINGLET_E_HANDLE, kinglet_session_save(NULL, "x", 1));
    STATUS(KINGLET_E_HANDLE, kinglet_session_load(NULL, "x", 1));
    STATUS(KINGLET_E_HANDLE, kinglet_request_start(&request, NULL, "x", 1, NULL, NULL, NULL));
    CHECK(request == NULL);
    STATUS(KINGLET_E_HANDLE, kinglet_request_wait(NULL, 0, NULL));
    STATUS(KINGLET_E_HANDLE, kinglet_request_cancel(NULL));
}

static void runtime_and_cancel(void) {
    kinglet_runtime *runtime, *other;
    kinglet_cancel *cancel;
    STATUS(KINGLET_E_ARGUMENT, kinglet_runtime_create(NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_cancel_create(NULL));
    OK(kinglet_runtime_create(&runtime));
    OK(kinglet_cancel_create(&cancel));
    STATUS(KINGLET_E_ARGUMENT, kinglet_runtime_notify(runtime, (kinglet_event)0));
    STATUS(KINGLET_E_ARGUMENT, kinglet_runtime_notify(runtime, (kinglet_event)7));
    STATUS(KINGLET_E_HANDLE, kinglet_cancel_set((kinglet_cancel *)runtime));
    STATUS(KINGLET_E_HANDLE, kinglet_runtime_notify((kinglet_runtime *)cancel, KINGLET_EVENT_FOREGROUND));
    kinglet_runtime_release((kinglet_runtime *)cancel); /* of another kind: stays */
    OK(kinglet_cancel_set(cancel));
    kinglet_cancel_release(cancel);
    kinglet_cancel_release(cancel);
    STATUS(KINGLET_E_HANDLE, kinglet_cancel_set(cancel));
    kinglet_runtime_release(runtime);
    OK(kinglet_runtime_create(&other)); /* in the same place */
    CHECK(other != runtime);
    STATUS(KINGLET_E_HANDLE, kinglet_runtime_notify(runtime, KINGLET_EVENT_FOREGROUND));
    kinglet_runtime_release(other);
    STATUS(KINGLET_E_HANDLE, kinglet_runtime_notify((kinglet_runtime *)SIZE_MAX, KINGLET_EVENT_FOREGROUND));
}

static void models(kinglet_runtime *runtime, const char *path) {
    kinglet_model *model;
    kinglet_cancel *cancel;
    size_t len = strlen(path);
    kinglet_model_params params = {sizeof params, 0, 0, 1, 0, 0, NULL, 0, 0};
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_load(NULL, runtime, path, len, NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_load(&model, runtime, NULL, 3, NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_load(&model, runtime, path, SIZE_MAX, NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_load(&model, runtime, "\xff\xfe", 2, NULL));
    STATUS(KINGLET_E_IO, kinglet_model_load(&model, runtime, NULL, 0, NULL));
    STATUS(KINGLET_E_IO, kinglet_model_load(&model, runtime, "no such file", 12, NULL));
    STATUS(KINGLET_E_IO, kinglet_model_load(&model, runtime, path, len - 1, NULL));
    STATUS(KINGLET_E_FILE, kinglet_model_load(&model, runtime, "/", 1, NULL));
    size_t sizes[] = {0, 1, offsetof(kinglet_model_params, repack) - 1, 4097, SIZE_MAX};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        params.struct_size = sizes[i];
        STATUS(KINGLET_E_ARGUMENT, kinglet_model_load(&model, runtime, path, len, &params));
        CHECK(strstr(kinglet_error_last(), "struct_size") != NULL);
    }
    params.struct_size = sizeof params;
    params.threads = 257;
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_load(&model, runtime, path, len, &params));
    params.threads = 1;
    params.degrade = 2;
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_load(&model, runtime, path, len, &params));
    params.degrade = 0;
    params.reserved = 1;
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_load(&model, runtime, path, len, &params));
    params.reserved = 0;
    params.cancel = (kinglet_cancel *)runtime;
    STATUS(KINGLET_E_HANDLE, kinglet_model_load(&model, runtime, path, len, &params));
    OK(kinglet_cancel_create(&cancel));
    OK(kinglet_cancel_set(cancel));
    params.cancel = cancel;
    STATUS(KINGLET_E_CANCELLED, kinglet_model_load(&model, runtime, path, len, &params));
    CHECK(model == NULL);
    kinglet_cancel_release(cancel);
    /* A caller that knows more: its new fields count only if they are set. */
    struct { kinglet_model_params known; uint64_t more; } later = {{sizeof later, 0, 0, 1, 0, 0, NULL, 0, 0}, 1};
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_load(&model, runtime, path, len, &later.known));
    later.more = 0;
    OK(kinglet_model_load(&model, runtime, path, len, &later.known));

    struct { kinglet_model_info known; uint64_t more; } info = {{0, 0, 0, 0, 0, 0, 0, 0, 0}, 7};
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_describe(model, NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_describe(model, &info.known));
    info.known.struct_size = sizeof info;
    OK(kinglet_model_describe(model, &info.known));
    CHECK(info.known.struct_size == sizeof info && info.more == 0);
    CHECK(info.known.n_vocab > 0 && info.known.threads == 1);
    kinglet_buffer *name;
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_name(model, NULL));
    OK(kinglet_model_name(model, &name));
    const char *data;
    size_t name_len;
    STATUS(KINGLET_E_ARGUMENT, kinglet_buffer_data(name, NULL, &name_len));
    STATUS(KINGLET_E_ARGUMENT, kinglet_buffer_data(name, &data, NULL));
    OK(kinglet_buffer_data(name, &data, &name_len));
    CHECK(data != NULL && name_len > 0);
    kinglet_buffer_release(name);
    STATUS(KINGLET_E_HANDLE, kinglet_buffer_data(name, &data, &name_len));
    uint64_t freed = 9;
    OK(kinglet_model_trim(model, UINT64_MAX, &freed));
    CHECK(freed == 0);
    OK(kinglet_model_trim(model, 0, NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_set_memory(model, UINT64_MAX)); /* it has no budget */
    kinglet_model_release(model);
    kinglet_model_params bounded;
    memset(&bounded, 0, sizeof bounded);
    bounded.struct_size = sizeof bounded;
    bounded.memory = UINT64_C(4) << 30;
    OK(kinglet_model_load(&model, runtime, path, len, &bounded));
    STATUS(KINGLET_E_BUDGET, kinglet_model_set_memory(model, 1));
    OK(kinglet_model_set_memory(model, UINT64_C(8) << 30));
    kinglet_model_release(model);
    STATUS(KINGLET_E_HANDLE, kinglet_model_trim(model, 1, NULL));

    kinglet_plan plan;
    memset(&plan, 0, sizeof plan);
    STATUS(KINGLET_E_ARGUMENT, kinglet_plan_make(NULL, path, len, NULL, NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_plan_make(&plan, path, len, NULL, NULL));
    plan.struct_size = sizeof plan;
    STATUS(KINGLET_E_ARGUMENT, kinglet_plan_make(&plan, NULL, 1, NULL, NULL));
    OK(kinglet_plan_make(&plan, path, len, NULL, NULL));
    CHECK(plan.total == plan.weights + plan.own_weights + plan.experts + plan.kv + plan.conv + plan.scratch +
                            plan.tokenizer + plan.runtime + plan.program);
    kinglet_model_params tight = {sizeof tight, 1000, 0, 1, 0, 0, NULL, 0, 0};
    STATUS(KINGLET_E_BUDGET, kinglet_plan_make(&plan, path, len, &tight, NULL));
    kinglet_session_params session = {sizeof session, 512, 32, KINGLET_KV_F32, KINGLET_KV_F16, 0};
    OK(kinglet_plan_make(&plan, path, len, NULL, &session));
    CHECK(plan.n_ctx == 512 && plan.batch == 32 && plan.keys == KINGLET_KV_F32 && plan.values == KINGLET_KV_F16);
}

/* A model in the middle of an open file. */
static void open_files(kinglet_runtime *runtime, const char *path, const char *folder) {
    kinglet_model *model;
    kinglet_model_params params = {sizeof params, 0, 0, 1, 0, 0, NULL, 0, 0};
    kinglet_plan plan, of_path;
    char packed[1024], byte;
    int pipes[2];
    memset(&plan, 0, sizeof plan);
    plan.struct_size = sizeof plan;
    of_path = plan;
    snprintf(packed, sizeof packed, "%s/packed", folder);
    FILE *from = fopen(path, "rb"), *to = fopen(packed, "wb");
    CHECK(from != NULL && to != NULL);
    for (int i = 0; i < 1000; i++) CHECK(fputc('x', to) != EOF);
    uint64_t len = 0;
    for (int c; (c = fgetc(from)) != EOF; len++) CHECK(fputc(c, to) != EOF);
    for (int i = 0; i < 1000; i++) CHECK(fputc('y', to) != EOF);
    CHECK(fclose(from) == 0 && fclose(to) == 0);
    int fd = open(packed, O_RDONLY);
    CHECK(fd >= 0);
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_load_fd(NULL, runtime, fd, 1000, len, NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_load_fd(&model, runtime, -1, 1000, len, NULL));
    STATUS(KINGLET_E_IO, kinglet_model_load_fd(&model, runtime, 1000000, 1000, len, NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_load_fd(&model, runtime, fd, 1002, len, NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_load_fd(&model, runtime, fd, 1000, UINT64_MAX, NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_load_fd(&model, runtime, fd, UINT64_MAX - 3, 2, NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_load_fd(&model, runtime, fd, UINT64_MAX - 3, 0, NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_load_fd(&model, runtime, fd, 1000, len + 1001, NULL));
    STATUS(KINGLET_E_FILE, kinglet_model_load_fd(&model, runtime, fd, 1000, 1, NULL));
    STATUS(KINGLET_E_FILE, kinglet_model_load_fd(&model, runtime, fd, 1000, len - 1, NULL));
    STATUS(KINGLET_E_FILE, kinglet_model_load_fd(&model, runtime, fd, 0, 0, NULL));
    CHECK(pipe(pipes) == 0);
    STATUS(KINGLET_E_FILE, kinglet_model_load_fd(&model, runtime, pipes[0], 0, 8, NULL));
    CHECK(close(pipes[0]) == 0 && close(pipes[1]) == 0);
    params.struct_size = 7;
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_load_fd(&model, runtime, fd, 1000, len, &params));
    params.struct_size = sizeof params;
    CHECK(model == NULL);

    STATUS(KINGLET_E_ARGUMENT, kinglet_plan_make_fd(NULL, fd, 1000, len, NULL, NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_plan_make_fd(&plan, -1, 1000, len, NULL, NULL));
    STATUS(KINGLET_E_FILE, kinglet_plan_make_fd(&plan, fd, 0, len, NULL, NULL));
    OK(kinglet_plan_make_fd(&plan, fd, 1000, len, &params, NULL));
    OK(kinglet_plan_make(&of_path, path, strlen(path), &params, NULL));
    CHECK(plan.weights == of_path.weights && plan.kv == of_path.kv && plan.n_ctx == of_path.n_ctx);

    params.memory = 1u << 30; /* sessions of a budget read the header again */
    OK(kinglet_model_load_fd(&model, runtime, fd, 1000, len, &params));
    CHECK(read(fd, &byte, 1) == 1 && byte == 'x'); /* where it was */
    CHECK(close(fd) == 0 && remove(packed) == 0);
    kinglet_session *session;
    kinglet_session_params small = {sizeof small, 128, 0, 0, 0, 0};
    kinglet_generate_params generate = {sizeof generate, 2, NULL, 0, 1, 0, NULL, NULL, 0, NULL, 0};
    OK(kinglet_session_create(&session, model, &small));
    OK(kinglet_session_complete(session, "Once", 4, &generate, NULL, NULL, NULL));
    kinglet_session_release(session);
    kinglet_model_release(model);
}

/* Tokens, tools, vectors, profiles. */
static void more(kinglet_runtime *runtime, const char *path) {
    kinglet_model *model = load(runtime, path);
    kinglet_session *session;
    kinglet_session_params small = {sizeof small, 128, 0, 0, 0, 0};
    kinglet_buffer *buffer;
    const char *data;
    uint32_t tokens[64];
    size_t n = 77, len;
    static const char text[] = "Na\xc3\xafve fox, <|im_end|>";
    OK(kinglet_session_create(&session, model, &small));
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_tokenize(model, NULL, 1, 0, tokens, 64, &n));
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_tokenize(model, "\xff", 1, 0, tokens, 64, &n));
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_tokenize(model, text, SIZE_MAX, 0, tokens, 64, &n));
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_tokenize(model, text, sizeof text - 1, 4, tokens, 64, &n));
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_tokenize(model, text, sizeof text - 1, 0, NULL, 64, &n));
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_tokenize(model, text, sizeof text - 1, 0, tokens, 64, NULL));
    CHECK(n == 77);
    STATUS(KINGLET_E_SPACE, kinglet_model_tokenize(model, text, sizeof text - 1, 0, NULL, 0, &n));
    CHECK(n > 5 && n < 64);
    tokens[n - 1] = 123456789;
    STATUS(KINGLET_E_SPACE, kinglet_model_tokenize(model, text, sizeof text - 1, 0, tokens, n - 1, &len));
    CHECK(len == n && tokens[n - 1] == 123456789);
    OK(kinglet_model_tokenize(model, text, sizeof text - 1, 0, tokens, n, &len));
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_detokenize(model, NULL, tokens, n));
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_detokenize(model, &buffer, NULL, 1));
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_detokenize(model, &buffer, tokens, SIZE_MAX));
    CHECK(buffer == NULL);
    OK(kinglet_model_detokenize(model, &buffer, tokens, n));
    OK(kinglet_buffer_data(buffer, &data, &len));
    CHECK(len == sizeof text - 1 && memcmp(data, text, len) == 0);
    kinglet_buffer_release(buffer);
    /* As a control token it has no text. */
    OK(kinglet_model_tokenize(model, text, sizeof text - 1, KINGLET_TOKENIZE_CONTROL | KINGLET_TOKENIZE_ENDS, tokens, 64, &n));
    OK(kinglet_model_detokenize(model, &buffer, tokens, n));
    OK(kinglet_buffer_data(buffer, &data, &len));
    CHECK(len == sizeof text - 1 - 10 && memcmp(data, text, len) == 0);
    kinglet_buffer_release(buffer);
    tokens[0] = UINT32_MAX;
    STATUS(KINGLET_E_ARGUMENT, kinglet_model_detokenize(model, &buffer, tokens, 1));
    OK(kinglet_model_tokenize(model, NULL, 0, 0, NULL, 0, &n));
    CHECK(n == 0);
    OK(kinglet_model_detokenize(model, &buffer, NULL, 0));
    kinglet_buffer_release(buffer);

    STATUS(KINGLET_E_ARGUMENT, kinglet_session_set_tools(session, NULL, 2));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_set_tools(session, "[]", SIZE_MAX));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_set_tools(session, "{}", 2));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_set_tools(session, "[", 1));
    OK(kinglet_session_set_tools(session, NULL, 0));
    OK(kinglet_session_set_tools(session, "[]", 2));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_answer(session, NULL, 2, NULL, NULL, NULL, NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_answer(session, "[]", 2, NULL, NULL, NULL, NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_answer(session, "[7]", 3, NULL, NULL, NULL, NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_answer(session, "[]", SIZE_MAX, NULL, NULL, NULL, NULL));

    kinglet_model_info info = {sizeof info, 0, 0, 0, 0, 0, 0, 0, 0};
    OK(kinglet_model_describe(model, &info));
    float *vector = (float *)malloc(info.hidden * sizeof *vector);
    kinglet_embed_params embed = {sizeof embed, 0, 0, NULL};
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_embed(session, NULL, 1, NULL, vector, info.hidden, &n));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_embed(session, "x", SIZE_MAX, NULL, vector, info.hidden, &n));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_embed(session, "x", 1, NULL, NULL, info.hidden, &n));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_embed(session, "x", 1, NULL, vector, info.hidden, NULL));
    STATUS(KINGLET_E_SPACE, kinglet_session_embed(session, "x", 1, NULL, NULL, 0, &n));
    CHECK(n == info.hidden);
    STATUS(KINGLET_E_SPACE, kinglet_session_embed(session, "x", 1, NULL, vector, info.hidden - 1, &n));
    embed.pooling = KINGLET_POOLING_NONE;
    STATUS(KINGLET_E_SPACE, kinglet_session_embed(session, "A fox.", 6, &embed, vector, info.hidden, &n));
    CHECK(n % info.hidden == 0 && n > 2 * info.hidden);
    vector = (float *)realloc(vector, n * sizeof *vector);
    OK(kinglet_session_embed(session, "A fox.", 6, &embed, vector, n, &n));
    embed.pooling = 4;
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_embed(session, "x", 1, &embed, vector, info.hidden, &n));
    embed.pooling = KINGLET_POOLING_LAST;
    embed.raw = 2;
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_embed(session, "x", 1, &embed, vector, info.hidden, &n));
    embed.raw = 0;
    embed.cancel = (kinglet_cancel *)model;
    STATUS(KINGLET_E_HANDLE, kinglet_session_embed(session, "x", 1, &embed, vector, info.hidden, &n));
    size_t sizes[] = {0, sizeof embed - 1, 4097};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        embed.struct_size = sizes[i];
        STATUS(KINGLET_E_ARGUMENT, kinglet_session_embed(session, "x", 1, &embed, vector, info.hidden, &n));
    }
    embed.struct_size = sizeof embed;
    kinglet_cancel *cancel;
    OK(kinglet_cancel_create(&cancel));
    OK(kinglet_cancel_set(cancel));
    embed.cancel = cancel;
    STATUS(KINGLET_E_CANCELLED, kinglet_session_embed(session, "A fox.", 6, &embed, vector, info.hidden, &n));
    kinglet_cancel_release(cancel);
    embed.cancel = NULL;
    OK(kinglet_session_embed(session, "A fox.", 6, &embed, vector, info.hidden, &n));
    double length = 0;
    for (size_t i = 0; i < n; i++) length += (double)vector[i] * vector[i];
    CHECK(n == info.hidden && length > 0.999 && length < 1.001);
    char *long_text = (char *)malloc(4000);
    memset(long_text, 'a', 4000);
    for (size_t i = 1; i < 4000; i += 2) long_text[i] = ' ';
    STATUS(KINGLET_E_CONTEXT_FULL, kinglet_session_embed(session, long_text, 4000, NULL, vector, info.hidden, &n));
    free(long_text);
    free(vector);
    kinglet_session_release(session);
    kinglet_model_release(model);

    kinglet_profile *profile;
    kinglet_profile_params run = {sizeof run, 8, 4};
    size_t path_len = strlen(path);
    STATUS(KINGLET_E_ARGUMENT, kinglet_profile_make(NULL, path, path_len, NULL, &run));
    STATUS(KINGLET_E_ARGUMENT, kinglet_profile_make(&profile, NULL, 1, NULL, &run));
    STATUS(KINGLET_E_ARGUMENT, kinglet_profile_make(&profile, path, SIZE_MAX, NULL, &run));
    run.struct_size = 1;
    STATUS(KINGLET_E_ARGUMENT, kinglet_profile_make(&profile, path, path_len, NULL, &run));
    run.struct_size = sizeof run;
    run.n_gen = UINT32_MAX;
    STATUS(KINGLET_E_ARGUMENT, kinglet_profile_make(&profile, path, path_len, NULL, &run));
    run.n_gen = 4;
    CHECK(profile == NULL);
    OK(kinglet_profile_make(&profile, path, path_len, NULL, &run));
    STATUS(KINGLET_E_ARGUMENT, kinglet_profile_json(profile, NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_profile_trace(profile, NULL));
    OK(kinglet_profile_json(profile, &buffer));
    OK(kinglet_buffer_data(buffer, &data, &len));
    CHECK(len > 100 && data[0] == '{' && data[len - 1] == '}');
    kinglet_buffer_release(buffer);
    OK(kinglet_profile_trace(profile, &buffer));
    OK(kinglet_buffer_data(buffer, &data, &len));
    CHECK(len > 100);
    kinglet_buffer_release(buffer);
    kinglet_profile_release(profile);
    STATUS(KINGLET_E_HANDLE, kinglet_profile_json(profile, &buffer));
}

static void sessions(kinglet_runtime *runtime, const char *path, const char *folder) {
    kinglet_model *model = load(runtime, path);
    kinglet_session *session, *fork;
    kinglet_buffer *buffer;
    kinglet_request *request;
    kinglet_session_params params = {sizeof params, 0, 0, 5, 0, 0};
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_create(NULL, model, NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_create(&session, model, &params));
    params.keys = 0;
    params.n_ctx = UINT64_MAX;
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_create(&session, model, &params));
    params.n_ctx = 256;
    params.reserved = 1;
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_create(&session, model, &params));
    params.reserved = 0;
    params.struct_size = 8;
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_create(&session, model, &params));
    params.struct_size = sizeof params;
    params.batch = UINT32_MAX; /* more than the context: all at once */
    OK(kinglet_session_create(&session, model, &params));
    kinglet_session_info info = {0, 0, 0, 0, 0, 0, 0};
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_describe(session, NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_describe(session, &info));
    info.struct_size = sizeof info;
    OK(kinglet_session_describe(session, &info));
    CHECK(info.n_ctx == 256 && info.n_tokens == 0 && info.n_messages == 0);

    STATUS(KINGLET_E_ARGUMENT, kinglet_session_set(session, NULL, 4, "1", 1));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_set(session, "temp", 4, NULL, 1));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_set(session, "temp", 4, "hot", 3));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_set(session, "tamp", 4, "1", 1));
    OK(kinglet_session_set(session, "temp", 4, "0", 1));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_set_system(session, NULL, 1));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_set_system(session, "x", SIZE_MAX));
    OK(kinglet_session_set_system(session, NULL, 0));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_messages(session, NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_set_messages(session, NULL, 2));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_set_messages(session, "{", 1));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_rewind(session, 1));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_rewind(session, UINT64_MAX));
    OK(kinglet_session_rewind(session, 0));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_send(session, NULL, 1, NULL, NULL, NULL, NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_send(session, "\xc3", 1, NULL, NULL, NULL, NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_complete(session, NULL, 1, NULL, NULL, NULL, NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_regenerate(session, NULL, NULL, NULL, NULL));
    kinglet_reply reply;
    memset(&reply, 0, sizeof reply);
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_send(session, "x", 1, NULL, &reply, NULL, NULL));
    kinglet_text stops[65] = {{NULL, 1}};
    kinglet_generate_params generate = {sizeof generate, 2, stops, 1, 0, 0, NULL, NULL, 0, NULL, 0};
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_send(session, "x", 1, &generate, NULL, NULL, NULL));
    generate.n_stops = 65;
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_send(session, "x", 1, &generate, NULL, NULL, NULL));
    generate.n_stops = SIZE_MAX;
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_send(session, "x", 1, &generate, NULL, NULL, NULL));
    generate.stops = NULL;
    generate.n_stops = 1;
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_send(session, "x", 1, &generate, NULL, NULL, NULL));
    generate.n_stops = 0;
    generate.ignore_end = 2;
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_send(session, "x", 1, &generate, NULL, NULL, NULL));
    generate.ignore_end = 0;
    generate.reserved = 1;
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_send(session, "x", 1, &generate, NULL, NULL, NULL));
    generate.reserved = 0;
    generate.json_schema_len = 1;
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_send(session, "x", 1, &generate, NULL, NULL, NULL));
    generate.json_schema = "{\"type\": \"strin\"}";
    generate.json_schema_len = SIZE_MAX;
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_send(session, "x", 1, &generate, NULL, NULL, NULL));
    generate.json_schema_len = strlen(generate.json_schema);
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_send(session, "x", 1, &generate, NULL, NULL, NULL));
    CHECK(strstr(kinglet_error_last(), "JSON schema at `/`") != NULL);
    STATUS(KINGLET_E_ARGUMENT, kinglet_request_start(&request, session, "x", 1, &generate, NULL, NULL));
    CHECK(request == NULL);
    generate.grammar = "start: \"yes\" | \"no\"";
    generate.grammar_len = strlen(generate.grammar);
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_send(session, "x", 1, &generate, NULL, NULL, NULL)); /* both */
    generate.json_schema_len = 0;
    generate.grammar_len = SIZE_MAX;
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_send(session, "x", 1, &generate, NULL, NULL, NULL));
    generate.grammar_len = 0;
    /* A caller of the first version, for whom the struct ended with `cancel`. */
    size_t sizes[] = {0, offsetof(kinglet_generate_params, json_schema) - 1, 4097, SIZE_MAX};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        generate.struct_size = sizes[i];
        STATUS(KINGLET_E_ARGUMENT, kinglet_session_send(session, "x", 1, &generate, NULL, NULL, NULL));
    }
    generate.grammar_len = SIZE_MAX; /* is not read */
    generate.struct_size = offsetof(kinglet_generate_params, json_schema);
    generate.max_tokens = 1;
    OK(kinglet_session_complete(session, "x", 1, &generate, NULL, NULL, NULL));
    generate.max_tokens = 2;
    generate.grammar_len = 0;
    generate.struct_size = sizeof generate;
    generate.cancel = (kinglet_cancel *)model;
    STATUS(KINGLET_E_HANDLE, kinglet_session_send(session, "x", 1, &generate, NULL, NULL, NULL));
    STATUS(KINGLET_E_HANDLE, kinglet_request_start(&request, session, "x", 1, &generate, NULL, NULL));
    generate.cancel = NULL;
    OK(kinglet_session_send(session, "x", 1, &generate, NULL, NULL, NULL)); /* nobody listens */
    char *long_text = (char *)malloc(100000);
    memset(long_text, 'a', 100000);
    for (size_t i = 1; i < 100000; i += 2) long_text[i] = ' ';
    STATUS(KINGLET_E_CONTEXT_FULL, kinglet_session_send(session, long_text, 100000, NULL, NULL, NULL, NULL));
    STATUS(KINGLET_E_CONTEXT_FULL, kinglet_session_complete(session, long_text, 100000, NULL, NULL, NULL, NULL));
    free(long_text);
    OK(kinglet_session_describe(session, &info));
    CHECK(info.n_messages == 2);

    STATUS(KINGLET_E_ARGUMENT, kinglet_session_fork(NULL, session));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_save(session, NULL, 1));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_load(session, NULL, 1));
    STATUS(KINGLET_E_IO, kinglet_session_save(session, "/no/such/folder", 15));
    STATUS(KINGLET_E_IO, kinglet_session_load(session, "/no/such/file", 13));
    STATUS(KINGLET_E_FILE, kinglet_session_load(session, folder, strlen(folder)));
    STATUS(KINGLET_E_FILE, kinglet_session_load(session, path, strlen(path)));
    STATUS(KINGLET_E_ARGUMENT, kinglet_request_start(NULL, session, "x", 1, NULL, NULL, NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_request_start(&request, session, NULL, 1, NULL, NULL, NULL));
    generate.max_tokens = 1;
    OK(kinglet_request_start(&request, session, "x", 1, &generate, NULL, NULL));
    reply.struct_size = 3;
    STATUS(KINGLET_E_ARGUMENT, kinglet_request_wait(request, 60000, &reply));
    reply.struct_size = sizeof reply;
    OK(kinglet_request_wait(request, 60000, &reply));
    OK(kinglet_request_wait(request, 0, NULL));
    CHECK(reply.reply_tokens == 1 && reply.finish == KINGLET_FINISH_LENGTH);
    OK(kinglet_request_cancel(request));
    kinglet_request_release(request);
    STATUS(KINGLET_E_HANDLE, kinglet_request_wait(request, 0, NULL));

    /* In an order that nobody should choose. */
    kinglet_model_release(model);
    OK(kinglet_session_fork(&fork, session));
    kinglet_session_release(session);
    STATUS(KINGLET_E_HANDLE, kinglet_session_messages(session, &buffer));
    STATUS(KINGLET_E_HANDLE, kinglet_session_create(&session, model, NULL));
    OK(kinglet_session_regenerate(fork, &generate, NULL, NULL, NULL));
    kinglet_session_release(fork);
}

/* Every struct with sizes that none has in any version, by each function that takes it; every text longer than any. */
static void sizes(kinglet_runtime *runtime, const char *path) {
    static const size_t wrong[] = {0, 1, sizeof(size_t), 4097, SIZE_MAX};
    size_t len = strlen(path), n;
    kinglet_model *model = load(runtime, path), *another;
    kinglet_session *session = open_session(model), *other;
    kinglet_request *request;
    kinglet_profile *profile;
    float number;
    kinglet_model_params load_params;
    kinglet_session_params open_params;
    kinglet_generate_params params;
    kinglet_embed_params embed;
    kinglet_profile_params run;
    kinglet_model_info model_info;
    kinglet_session_info session_info;
    kinglet_plan plan;
    kinglet_reply reply;
#define SIZES(of, call)                                                                                                \
    memset(&of, 0, sizeof of);                                                                                         \
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {                                                        \
        of.struct_size = wrong[i];                                                                                     \
        STATUS(KINGLET_E_ARGUMENT, call);                                                                              \
        CHECK(strstr(kinglet_error_last(), "struct_size") != NULL && of.struct_size == wrong[i]);                      \
    }
    memset(&plan, 0, sizeof plan);
    plan.struct_size = sizeof plan;
    SIZES(load_params, kinglet_model_load(&another, runtime, path, len, &load_params))
    SIZES(load_params, kinglet_model_load_fd(&another, runtime, 0, 0, 0, &load_params))
    SIZES(load_params, kinglet_plan_make(&plan, path, len, &load_params, NULL))
    SIZES(load_params, kinglet_plan_make_fd(&plan, 0, 0, 0, &load_params, NULL))
    SIZES(load_params, kinglet_profile_make(&profile, path, len, &load_params, NULL))
    SIZES(open_params, kinglet_session_create(&other, model, &open_params))
    SIZES(open_params, kinglet_plan_make(&plan, path, len, NULL, &open_params))
    SIZES(open_params, kinglet_plan_make_fd(&plan, 0, 0, 0, NULL, &open_params))
    SIZES(plan, kinglet_plan_make(&plan, path, len, NULL, NULL))
    SIZES(plan, kinglet_plan_make_fd(&plan, 0, 0, 0, NULL, NULL))
    SIZES(run, kinglet_profile_make(&profile, path, len, NULL, &run))
    SIZES(model_info, kinglet_model_describe(model, &model_info))
    SIZES(session_info, kinglet_session_describe(session, &session_info))
    SIZES(embed, kinglet_session_embed(session, "x", 1, &embed, &number, 1, &n))
    SIZES(params, kinglet_session_send(session, "x", 1, &params, NULL, NULL, NULL))
    SIZES(params, kinglet_session_answer(session, "[{\"role\":\"tool\"}]", 17, &params, NULL, NULL, NULL))
    SIZES(params, kinglet_session_regenerate(session, &params, NULL, NULL, NULL))
    SIZES(params, kinglet_session_complete(session, "x", 1, &params, NULL, NULL, NULL))
    SIZES(params, kinglet_request_start(&request, session, "x", 1, &params, NULL, NULL))
    SIZES(reply, kinglet_session_send(session, "x", 1, NULL, &reply, NULL, NULL))
    SIZES(reply, kinglet_session_answer(session, "[{\"role\":\"tool\"}]", 17, NULL, &reply, NULL, NULL))
    SIZES(reply, kinglet_session_regenerate(session, NULL, &reply, NULL, NULL))
    SIZES(reply, kinglet_session_complete(session, "x", 1, NULL, &reply, NULL, NULL))
    CHECK(another == NULL && other == NULL && request == NULL && profile == NULL);

    plan.struct_size = sizeof plan;
    STATUS(KINGLET_E_ARGUMENT, kinglet_plan_make(&plan, path, SIZE_MAX, NULL, NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_set(session, "temp", SIZE_MAX, "1", 1));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_set(session, "temp", 4, "1", SIZE_MAX));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_set_messages(session, "[]", SIZE_MAX));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_send(session, "x", SIZE_MAX, NULL, NULL, NULL, NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_complete(session, "x", SIZE_MAX, NULL, NULL, NULL, NULL));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_save(session, "x", SIZE_MAX));
    STATUS(KINGLET_E_ARGUMENT, kinglet_session_load(session, "x", SIZE_MAX));
    STATUS(KINGLET_E_ARGUMENT, kinglet_request_start(&request, session, "x", SIZE_MAX, NULL, NULL, NULL));
    kinglet_session_release(session);
    kinglet_model_release(model);
}

/* A model that can only continue texts. */
static void plain(kinglet_runtime *runtime, const char *path) {
    kinglet_model *model = load(runtime, path);
    kinglet_session *session = open_session(model);
    kinglet_request *request;
    kinglet_buffer *buffer;
    kinglet_generate_params params = {sizeof params, 3, NULL, 0, 1, 0, NULL, NULL, 0, NULL, 0};
    STATUS(KINGLET_E_TEMPLATE, kinglet_session_send(session, "x", 1, &params, NULL, NULL, NULL));
    STATUS(KINGLET_E_TEMPLATE, kinglet_session_messages(session, &buffer));
    STATUS(KINGLET_E_TEMPLATE, kinglet_session_set_system(session, "x", 1));
    OK(kinglet_session_complete(session, "x", 1, &params, NULL, NULL, NULL));
    OK(kinglet_session_complete(session, NULL, 0, &params, NULL, NULL, NULL));
    OK(kinglet_request_start(&request, session, "x", 1, &params, NULL, NULL));
    STATUS(KINGLET_E_TEMPLATE, kinglet_request_wait(request, 60000, NULL));
    CHECK(strstr(kinglet_error_last(), "template") != NULL);
    kinglet_request_release(request);
    kinglet_session_release(session);
    kinglet_model_release(model);
}

int main(int argc, char **argv) {
    CHECK(argc == 4);
    CHECK(kinglet_error_last()[0] == 0);
    CHECK(kinglet_version()[0] != 0);
    CHECK(strcmp(kinglet_status_name(KINGLET_E_POISONED), "KINGLET_E_POISONED") == 0);
    CHECK(strcmp(kinglet_status_name((kinglet_status)99), "unknown") == 0);
    null_handles();
    runtime_and_cancel();
    kinglet_runtime *runtime;
    OK(kinglet_runtime_create(&runtime));
    models(runtime, argv[1]);
    open_files(runtime, argv[1], argv[2]);
    more(runtime, argv[1]);
    sessions(runtime, argv[1], argv[2]);
    sizes(runtime, argv[1]);
    plain(runtime, argv[3]);
    releases();
    kinglet_runtime_release(runtime);
    return 0;
}
