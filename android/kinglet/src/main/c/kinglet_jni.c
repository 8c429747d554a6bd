/* Kinglet for the JVM: the functions of Native.kt, each one call of kinglet.h, which says what they do.
 *
 * Texts cross as arrays of UTF-8 bytes. The strings of JNI are "modified" UTF-8, which writes what lies beyond the
 * first 65,536 characters, emoji among them, as two halves of three bytes that nobody else reads. Handles cross as
 * numbers, structs as arrays of numbers in the order of their fields. A status that is not KINGLET_OK becomes a
 * KingletException. Replies are made on the thread that calls, so a callback is on a thread of the JVM, and what it
 * throws is pending when the call returns: it reaches the caller as it is. Only the class of the exception is kept,
 * by the one global reference of this file.
 */
#include <jni.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kinglet.h"

#define HANDLE(kind, number) ((kinglet_##kind *)(intptr_t)(number))
#define COUNT(array) (sizeof(array) / sizeof *(array))

static jclass failure;       /* dev.kinglet.KingletException */
static jmethodID failure_of; /* its constructor, (int, byte[]) */
static jmethodID tell;       /* Native.Sink.tell(int, byte[], long, long): boolean */

static jbyteArray array_of(JNIEnv *env, const char *bytes, size_t len) {
    jbyteArray array = len > INT32_MAX ? NULL : (*env)->NewByteArray(env, (jsize)len);
    if (array) (*env)->SetByteArrayRegion(env, array, 0, (jsize)len, (const jbyte *)bytes);
    return array; /* NULL: an OutOfMemoryError is pending */
}

static jlongArray numbers(JNIEnv *env, const jlong *values, size_t n) {
    jlongArray array = (*env)->NewLongArray(env, (jsize)n);
    if (array) (*env)->SetLongArrayRegion(env, array, 0, (jsize)n, values);
    return array;
}

/* Whether a call succeeded. If not its exception is pending; one that a callback threw goes before. */
static int good(JNIEnv *env, kinglet_status status) {
    if ((*env)->ExceptionCheck(env)) return 0;
    if (status == KINGLET_OK) return 1;
    const char *why = kinglet_error_last();
    jbyteArray message = array_of(env, why, strlen(why));
    jobject thrown = message ? (*env)->NewObject(env, failure, failure_of, (jint)status, message) : NULL;
    if (thrown) (*env)->Throw(env, (jthrowable)thrown);
    return 0;
}

/* Room that a call fills; NULL and an OutOfMemoryError if there is none. */
static void *room(JNIEnv *env, size_t n, size_t size) {
    void *items = n > INT32_MAX ? NULL : calloc(n + 1, size);
    jclass error = items ? NULL : (*env)->FindClass(env, "java/lang/OutOfMemoryError");
    if (error) (*env)->ThrowNew(env, error, "an array for the library");
    return items;
}

static jlong handle(JNIEnv *env, kinglet_status status, void *made) {
    return good(env, status) ? (jlong)(intptr_t)made : 0;
}

/* A text of the JVM during a call; that of a null array is empty. */
typedef struct text {
    jbyteArray array;
    jbyte *bytes;
    size_t len;
} text;

static int hold(JNIEnv *env, text *t, jbyteArray array) {
    memset(t, 0, sizeof *t);
    if (!array) return 1;
    t->array = array;
    t->len = (size_t)(*env)->GetArrayLength(env, array);
    t->bytes = (*env)->GetByteArrayElements(env, array, NULL);
    return t->bytes != NULL; /* NULL: an OutOfMemoryError is pending */
}

static void let_go(JNIEnv *env, text *t) {
    if (t->bytes) (*env)->ReleaseByteArrayElements(env, t->array, t->bytes, JNI_ABORT);
}

#define BYTES(t) (const char *)(t).bytes, (t).len

/* A function whose only argument besides the handle is a text. */
static void with_text(JNIEnv *env, jlong session, jbyteArray array,
                      kinglet_status (*call)(kinglet_session *, const char *, size_t)) {
    text t;
    if (!hold(env, &t, array)) return;
    kinglet_status status = call(HANDLE(session, session), BYTES(t));
    let_go(env, &t);
    good(env, status);
}

static jbyteArray bytes_of(JNIEnv *env, kinglet_status status, kinglet_buffer *buffer) {
    const char *data;
    size_t len;
    jbyteArray array = NULL;
    if (!good(env, status)) return NULL;
    if (good(env, kinglet_buffer_data(buffer, &data, &len))) array = array_of(env, data, len);
    kinglet_buffer_release(buffer);
    return array;
}

/* --- Library, cancel, runtime ------------------------------------------------------------------------------------- */

static jbyteArray version(JNIEnv *env, jclass class) {
    (void)class;
    return array_of(env, kinglet_version(), strlen(kinglet_version()));
}

static jlong cancel_create(JNIEnv *env, jclass class) {
    kinglet_cancel *cancel = NULL;
    (void)class;
    kinglet_status status = kinglet_cancel_create(&cancel);
    return handle(env, status, cancel);
}

/* Of one that was released nobody is left to end. */
static void cancel_set(JNIEnv *env, jclass class, jlong cancel) {
    (void)env, (void)class;
    (void)kinglet_cancel_set(HANDLE(cancel, cancel));
}

static void cancel_release(JNIEnv *env, jclass class, jlong cancel) {
    (void)env, (void)class;
    kinglet_cancel_release(HANDLE(cancel, cancel));
}

static jlong runtime_create(JNIEnv *env, jclass class) {
    kinglet_runtime *runtime = NULL;
    (void)class;
    kinglet_status status = kinglet_runtime_create(&runtime);
    return handle(env, status, runtime);
}

static void runtime_release(JNIEnv *env, jclass class, jlong runtime) {
    (void)env, (void)class;
    kinglet_runtime_release(HANDLE(runtime, runtime));
}

static void runtime_notify(JNIEnv *env, jclass class, jlong runtime, jint event) {
    (void)class;
    good(env, kinglet_runtime_notify(HANDLE(runtime, runtime), (kinglet_event)event));
}

/* --- Model -------------------------------------------------------------------------------------------------------- */

static kinglet_model_params model_params(jlong memory, jboolean degrade, jint threads, jint threads_batch,
                                         jlong cancel) {
    kinglet_model_params params = {0};
    params.struct_size = sizeof params;
    params.memory = (uint64_t)memory;
    params.degrade = degrade == JNI_TRUE;
    params.threads = (uint32_t)threads;
    params.threads_batch = (uint32_t)threads_batch;
    params.cancel = HANDLE(cancel, cancel);
    return params;
}

static kinglet_session_params session_params(jlong n_ctx, jint batch, jint keys, jint values) {
    kinglet_session_params params = {0};
    params.struct_size = sizeof params;
    params.n_ctx = (uint64_t)n_ctx;
    params.batch = (uint32_t)batch;
    params.keys = (uint32_t)keys;
    params.values = (uint32_t)values;
    return params;
}

static jlong model_load(JNIEnv *env, jclass class, jlong runtime, jbyteArray path, jlong memory, jboolean degrade,
                        jint threads, jint threads_batch, jlong cancel) {
    kinglet_model_params params = model_params(memory, degrade, threads, threads_batch, cancel);
    kinglet_model *model = NULL;
    text p;
    (void)class;
    if (!hold(env, &p, path)) return 0;
    kinglet_status status = kinglet_model_load(&model, HANDLE(runtime, runtime), BYTES(p), &params);
    let_go(env, &p);
    return handle(env, status, model);
}

static jlong model_load_fd(JNIEnv *env, jclass class, jlong runtime, jint fd, jlong offset, jlong len, jlong memory,
                           jboolean degrade, jint threads, jint threads_batch, jlong cancel) {
    kinglet_model_params params = model_params(memory, degrade, threads, threads_batch, cancel);
    kinglet_model *model = NULL;
    (void)class;
    kinglet_status status =
        kinglet_model_load_fd(&model, HANDLE(runtime, runtime), fd, (uint64_t)offset, (uint64_t)len, &params);
    return handle(env, status, model);
}

static void model_release(JNIEnv *env, jclass class, jlong model) {
    (void)env, (void)class;
    kinglet_model_release(HANDLE(model, model));
}

static jlongArray model_describe(JNIEnv *env, jclass class, jlong model) {
    kinglet_model_info i = {0};
    (void)class;
    i.struct_size = sizeof i;
    if (!good(env, kinglet_model_describe(HANDLE(model, model), &i))) return NULL;
    jlong values[] = {(jlong)i.n_params, (jlong)i.weight_bytes, (jlong)i.n_ctx_train,   (jlong)i.n_vocab,
                      (jlong)i.hidden,   (jlong)i.n_layers,     i.has_chat_template, i.threads};
    return numbers(env, values, COUNT(values));
}

static jbyteArray model_name(JNIEnv *env, jclass class, jlong model) {
    kinglet_buffer *name = NULL;
    (void)class;
    kinglet_status status = kinglet_model_name(HANDLE(model, model), &name);
    return bytes_of(env, status, name);
}

static jlong model_trim(JNIEnv *env, jclass class, jlong model, jlong bytes) {
    uint64_t freed = 0;
    (void)class;
    return good(env, kinglet_model_trim(HANDLE(model, model), (uint64_t)bytes, &freed)) ? (jlong)freed : 0;
}

static void model_set_memory(JNIEnv *env, jclass class, jlong model, jlong memory) {
    (void)class;
    good(env, kinglet_model_set_memory(HANDLE(model, model), (uint64_t)memory));
}

static jintArray model_tokenize(JNIEnv *env, jclass class, jlong model, jbyteArray array, jint flags) {
    jintArray numbers = NULL;
    text t;
    (void)class;
    if (!hold(env, &t, array)) return NULL;
    size_t cap = t.len + 2, n = 0; /* there are no more */
    uint32_t *tokens = (uint32_t *)room(env, cap, sizeof *tokens);
    if (tokens && good(env, kinglet_model_tokenize(HANDLE(model, model), BYTES(t), (uint32_t)flags, tokens, cap, &n))) {
        numbers = (*env)->NewIntArray(env, (jsize)n);
        if (numbers) (*env)->SetIntArrayRegion(env, numbers, 0, (jsize)n, (const jint *)tokens);
    }
    free(tokens);
    let_go(env, &t);
    return numbers;
}

static jbyteArray model_detokenize(JNIEnv *env, jclass class, jlong model, jintArray numbers) {
    kinglet_buffer *buffer = NULL;
    jsize n = (*env)->GetArrayLength(env, numbers);
    uint32_t *tokens = (uint32_t *)room(env, (size_t)n, sizeof *tokens);
    (void)class;
    if (!tokens) return NULL;
    (*env)->GetIntArrayRegion(env, numbers, 0, n, (jint *)tokens);
    kinglet_status status = kinglet_model_detokenize(HANDLE(model, model), &buffer, tokens, (size_t)n);
    free(tokens);
    return bytes_of(env, status, buffer);
}

static jlongArray plan(JNIEnv *env, const kinglet_plan *p) {
    jlong values[] = {(jlong)p->total,   (jlong)p->weights,   (jlong)p->own_weights, (jlong)p->experts, (jlong)p->kv,
                      (jlong)p->conv,    (jlong)p->scratch,   (jlong)p->tokenizer,   (jlong)p->runtime, (jlong)p->program,
                      (jlong)p->n_ctx,   p->batch,            p->keys,               p->values,         p->n_concessions};
    return numbers(env, values, COUNT(values));
}

static jlongArray plan_make(JNIEnv *env, jclass class, jbyteArray path, jlong memory, jboolean degrade, jint threads,
                            jint threads_batch, jlong n_ctx, jint batch, jint keys, jint values) {
    kinglet_model_params model = model_params(memory, degrade, threads, threads_batch, 0);
    kinglet_session_params session = session_params(n_ctx, batch, keys, values);
    kinglet_plan p = {0};
    text t;
    (void)class;
    p.struct_size = sizeof p;
    if (!hold(env, &t, path)) return NULL;
    kinglet_status status = kinglet_plan_make(&p, BYTES(t), &model, &session);
    let_go(env, &t);
    return good(env, status) ? plan(env, &p) : NULL;
}

static jlongArray plan_make_fd(JNIEnv *env, jclass class, jint fd, jlong offset, jlong len, jlong memory,
                               jboolean degrade, jint threads, jint threads_batch, jlong n_ctx, jint batch, jint keys,
                               jint values) {
    kinglet_model_params model = model_params(memory, degrade, threads, threads_batch, 0);
    kinglet_session_params session = session_params(n_ctx, batch, keys, values);
    kinglet_plan p = {0};
    (void)class;
    p.struct_size = sizeof p;
    kinglet_status status = kinglet_plan_make_fd(&p, fd, (uint64_t)offset, (uint64_t)len, &model, &session);
    return good(env, status) ? plan(env, &p) : NULL;
}

/* --- Profile ------------------------------------------------------------------------------------------------------ */

static jlong profile_make(JNIEnv *env, jclass class, jbyteArray path, jlong memory, jboolean degrade, jint threads,
                          jint threads_batch, jint n_prompt, jint n_gen, jlong cancel) {
    kinglet_model_params model = model_params(memory, degrade, threads, threads_batch, cancel);
    kinglet_profile_params params = {0};
    kinglet_profile *profile = NULL;
    text t;
    (void)class;
    params.struct_size = sizeof params;
    params.n_prompt = (uint32_t)n_prompt;
    params.n_gen = (uint32_t)n_gen;
    if (!hold(env, &t, path)) return 0;
    kinglet_status status = kinglet_profile_make(&profile, BYTES(t), &model, &params);
    let_go(env, &t);
    return handle(env, status, profile);
}

static jbyteArray profile_json(JNIEnv *env, jclass class, jlong profile) {
    kinglet_buffer *json = NULL;
    (void)class;
    kinglet_status status = kinglet_profile_json(HANDLE(profile, profile), &json);
    return bytes_of(env, status, json);
}

static jbyteArray profile_trace(JNIEnv *env, jclass class, jlong profile) {
    kinglet_buffer *json = NULL;
    (void)class;
    kinglet_status status = kinglet_profile_trace(HANDLE(profile, profile), &json);
    return bytes_of(env, status, json);
}

static void profile_release(JNIEnv *env, jclass class, jlong profile) {
    (void)env, (void)class;
    kinglet_profile_release(HANDLE(profile, profile));
}

/* --- Session ------------------------------------------------------------------------------------------------------ */

static jlong session_create(JNIEnv *env, jclass class, jlong model, jlong n_ctx, jint batch, jint keys, jint values) {
    kinglet_session_params params = session_params(n_ctx, batch, keys, values);
    kinglet_session *session = NULL;
    (void)class;
    kinglet_status status = kinglet_session_create(&session, HANDLE(model, model), &params);
    return handle(env, status, session);
}

static void session_release(JNIEnv *env, jclass class, jlong session) {
    (void)env, (void)class;
    kinglet_session_release(HANDLE(session, session));
}

static jlongArray session_describe(JNIEnv *env, jclass class, jlong session) {
    kinglet_session_info i = {0};
    (void)class;
    i.struct_size = sizeof i;
    if (!good(env, kinglet_session_describe(HANDLE(session, session), &i))) return NULL;
    jlong values[] = {(jlong)i.n_ctx, (jlong)i.n_tokens, (jlong)i.n_messages,
                      (jlong)i.kv,    (jlong)i.conv,     (jlong)i.scratch};
    return numbers(env, values, COUNT(values));
}

static void session_set(JNIEnv *env, jclass class, jlong session, jbyteArray name, jbyteArray value) {
    text n, v;
    (void)class;
    if (!hold(env, &n, name)) return;
    if (hold(env, &v, value)) {
        kinglet_status status = kinglet_session_set(HANDLE(session, session), BYTES(n), BYTES(v));
        let_go(env, &v);
        good(env, status);
    }
    let_go(env, &n);
}

static void session_set_system(JNIEnv *env, jclass class, jlong session, jbyteArray system) {
    (void)class;
    with_text(env, session, system, kinglet_session_set_system);
}

static jbyteArray session_messages(JNIEnv *env, jclass class, jlong session) {
    kinglet_buffer *json = NULL;
    (void)class;
    kinglet_status status = kinglet_session_messages(HANDLE(session, session), &json);
    return bytes_of(env, status, json);
}

static void session_set_messages(JNIEnv *env, jclass class, jlong session, jbyteArray json) {
    (void)class;
    with_text(env, session, json, kinglet_session_set_messages);
}

static void session_set_tools(JNIEnv *env, jclass class, jlong session, jbyteArray json) {
    (void)class;
    with_text(env, session, json, kinglet_session_set_tools);
}

static void session_rewind(JNIEnv *env, jclass class, jlong session, jlong n_messages) {
    (void)class;
    good(env, kinglet_session_rewind(HANDLE(session, session), (uint64_t)n_messages));
}

static jlong session_fork(JNIEnv *env, jclass class, jlong session) {
    kinglet_session *fork = NULL;
    (void)class;
    kinglet_status status = kinglet_session_fork(&fork, HANDLE(session, session));
    return handle(env, status, fork);
}

static void session_save(JNIEnv *env, jclass class, jlong session, jbyteArray path) {
    (void)class;
    with_text(env, session, path, kinglet_session_save);
}

static void session_load(JNIEnv *env, jclass class, jlong session, jbyteArray path) {
    (void)class;
    with_text(env, session, path, kinglet_session_load);
}

static jfloatArray session_embed(JNIEnv *env, jclass class, jlong session, jbyteArray array, jint pooling, jboolean raw,
                                 jlong cancel) {
    kinglet_embed_params params = {0};
    kinglet_session *of = HANDLE(session, session);
    jfloatArray vectors = NULL;
    size_t n = 0;
    text t;
    (void)class;
    params.struct_size = sizeof params;
    params.pooling = (uint32_t)pooling;
    params.raw = raw == JNI_TRUE;
    params.cancel = HANDLE(cancel, cancel);
    if (!hold(env, &t, array)) return NULL;
    kinglet_status status = kinglet_session_embed(of, BYTES(t), &params, NULL, 0, &n); /* says how many */
    float *floats = NULL;
    if (status == KINGLET_E_SPACE && (floats = (float *)room(env, n, sizeof *floats)) != NULL)
        status = kinglet_session_embed(of, BYTES(t), &params, floats, n, &n);
    if (good(env, status) && floats) {
        vectors = (*env)->NewFloatArray(env, (jsize)n);
        if (vectors) (*env)->SetFloatArrayRegion(env, vectors, 0, (jsize)n, floats);
    }
    free(floats);
    let_go(env, &t);
    return vectors;
}

/* Who is told about a reply. */
typedef struct listener {
    JNIEnv *env;
    jobject sink;
} listener;

static int on_chunk(const kinglet_chunk *chunk, void *user) {
    JNIEnv *env = ((listener *)user)->env;
    jbyteArray text = NULL;
    if (chunk->kind == KINGLET_CHUNK_TEXT || chunk->kind == KINGLET_CHUNK_CALL) {
        text = array_of(env, chunk->text, chunk->text_len);
        if (!text) return 1;
    }
    jboolean more = (*env)->CallBooleanMethod(env, ((listener *)user)->sink, tell, (jint)chunk->kind, text,
                                              (jlong)chunk->done, (jlong)chunk->total);
    if ((*env)->ExceptionCheck(env)) return 1;
    (*env)->DeleteLocalRef(env, text); /* a reply is one native frame, however many chunks it has */
    return more != JNI_TRUE;
}

enum { SEND, REGENERATE, COMPLETE, ANSWER };

/* One stop text more than are allowed, for the library to refuse. */
enum { MOST_STOPS = 65 };

static jlongArray session_reply(JNIEnv *env, jclass class, jlong session, jint how, jbyteArray prompt, jlong max_tokens,
                                jbyteArray stop_texts, jintArray stop_lengths, jboolean ignore_end, jbyteArray schema,
                                jbyteArray grammar, jlong cancel, jobject sink) {
    kinglet_generate_params params = {0};
    kinglet_reply r = {0};
    kinglet_text stops[MOST_STOPS];
    jint lengths[MOST_STOPS];
    listener user = {env, sink};
    enum { PROMPT, STOPS, SCHEMA, GRAMMAR, N_TEXTS };
    jbyteArray arrays[N_TEXTS] = {prompt, stop_texts, schema, grammar};
    text texts[N_TEXTS];
    int n_held = 0;
    kinglet_session *to = HANDLE(session, session);
    kinglet_status status = KINGLET_OK;
    (void)class;
    r.struct_size = sizeof r;
    params.struct_size = sizeof params;
    params.max_tokens = (uint64_t)max_tokens;
    params.ignore_end = ignore_end == JNI_TRUE;
    params.cancel = HANDLE(cancel, cancel);
    jsize n_stops = (*env)->GetArrayLength(env, stop_lengths);
    if (n_stops > MOST_STOPS) n_stops = MOST_STOPS;
    (*env)->GetIntArrayRegion(env, stop_lengths, 0, n_stops, lengths);
    while (n_held < N_TEXTS && hold(env, &texts[n_held], arrays[n_held])) n_held++;
    if (n_held == N_TEXTS) {
        const char *at = (const char *)texts[STOPS].bytes;
        for (jsize i = 0; i < n_stops; at += lengths[i++]) {
            stops[i].text = at;
            stops[i].text_len = (size_t)lengths[i];
        }
        params.stops = stops;
        params.n_stops = (size_t)n_stops;
        params.json_schema = (const char *)texts[SCHEMA].bytes;
        params.json_schema_len = texts[SCHEMA].len;
        params.grammar = (const char *)texts[GRAMMAR].bytes;
        params.grammar_len = texts[GRAMMAR].len;
        text p = texts[PROMPT];
        switch (how) {
        case SEND: status = kinglet_session_send(to, BYTES(p), &params, &r, on_chunk, &user); break;
        case REGENERATE: status = kinglet_session_regenerate(to, &params, &r, on_chunk, &user); break;
        case ANSWER: status = kinglet_session_answer(to, BYTES(p), &params, &r, on_chunk, &user); break;
        default: status = kinglet_session_complete(to, BYTES(p), &params, &r, on_chunk, &user); break;
        }
    }
    while (n_held > 0) let_go(env, &texts[--n_held]);
    if (!good(env, status)) return NULL;
    jlong values[] = {r.finish,
                      (jlong)r.prompt_tokens,
                      (jlong)r.reused_tokens,
                      (jlong)r.reply_tokens,
                      (jlong)r.prefill_ns,
                      (jlong)r.first_token_ns,
                      (jlong)r.decode_ns};
    return numbers(env, values, COUNT(values));
}

/* --- The table ---------------------------------------------------------------------------------------------------- */

#define METHOD(name, signature, function) {(char *)(name), (char *)(signature), (void *)(function)}

static const JNINativeMethod methods[] = {
    METHOD("version", "()[B", version),
    METHOD("cancelCreate", "()J", cancel_create),
    METHOD("cancelSet", "(J)V", cancel_set),
    METHOD("cancelRelease", "(J)V", cancel_release),
    METHOD("runtimeCreate", "()J", runtime_create),
    METHOD("runtimeRelease", "(J)V", runtime_release),
    METHOD("runtimeNotify", "(JI)V", runtime_notify),
    METHOD("modelLoad", "(J[BJZIIJ)J", model_load),
    METHOD("modelLoadFd", "(JIJJJZIIJ)J", model_load_fd),
    METHOD("modelRelease", "(J)V", model_release),
    METHOD("modelDescribe", "(J)[J", model_describe),
    METHOD("modelName", "(J)[B", model_name),
    METHOD("modelTrim", "(JJ)J", model_trim),
    METHOD("modelSetMemory", "(JJ)V", model_set_memory),
    METHOD("modelTokenize", "(J[BI)[I", model_tokenize),
    METHOD("modelDetokenize", "(J[I)[B", model_detokenize),
    METHOD("planMake", "([BJZIIJIII)[J", plan_make),
    METHOD("planMakeFd", "(IJJJZIIJIII)[J", plan_make_fd),
    METHOD("profileMake", "([BJZIIIIJ)J", profile_make),
    METHOD("profileJson", "(J)[B", profile_json),
    METHOD("profileTrace", "(J)[B", profile_trace),
    METHOD("profileRelease", "(J)V", profile_release),
    METHOD("sessionCreate", "(JJIII)J", session_create),
    METHOD("sessionRelease", "(J)V", session_release),
    METHOD("sessionDescribe", "(J)[J", session_describe),
    METHOD("sessionSet", "(J[B[B)V", session_set),
    METHOD("sessionSetSystem", "(J[B)V", session_set_system),
    METHOD("sessionMessages", "(J)[B", session_messages),
    METHOD("sessionSetMessages", "(J[B)V", session_set_messages),
    METHOD("sessionSetTools", "(J[B)V", session_set_tools),
    METHOD("sessionRewind", "(JJ)V", session_rewind),
    METHOD("sessionFork", "(J)J", session_fork),
    METHOD("sessionSave", "(J[B)V", session_save),
    METHOD("sessionLoad", "(J[B)V", session_load),
    METHOD("sessionEmbed", "(J[BIZJ)[F", session_embed),
    METHOD("sessionReply", "(JI[BJ[B[IZ[B[BJLdev/kinglet/Native$Sink;)[J", session_reply),
};

JNIEXPORT jint JNICALL JNI_OnLoad(JavaVM *vm, void *reserved) {
    JNIEnv *env;
    (void)reserved;
    if ((*vm)->GetEnv(vm, (void **)&env, JNI_VERSION_1_6) != JNI_OK) return JNI_ERR;
    jclass native = (*env)->FindClass(env, "dev/kinglet/Native");
    jclass sink = native ? (*env)->FindClass(env, "dev/kinglet/Native$Sink") : NULL;
    jclass found = sink ? (*env)->FindClass(env, "dev/kinglet/KingletException") : NULL;
    if (!found) return JNI_ERR; /* with the error pending, as below */
    tell = (*env)->GetMethodID(env, sink, "tell", "(I[BJJ)Z");
    failure_of = tell ? (*env)->GetMethodID(env, found, "<init>", "(I[B)V") : NULL;
    if (!failure_of) return JNI_ERR;
    if ((*env)->RegisterNatives(env, native, methods, (jint)COUNT(methods)) != JNI_OK) return JNI_ERR;
    failure = (jclass)(*env)->NewGlobalRef(env, found);
    return failure ? JNI_VERSION_1_6 : JNI_ERR;
}
