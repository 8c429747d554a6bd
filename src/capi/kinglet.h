/* Kinglet: language models on the device. The C interface; C99 and C++11. This file is its manual.
 *
 * A chat, errors left out:
 *
 *     static int print(const kinglet_chunk *chunk, void *user) {
 *         if (chunk->kind == KINGLET_CHUNK_TEXT) fwrite(chunk->text, 1, chunk->text_len, user);
 *         return 0;                                                  // anything else ends the reply
 *     }
 *
 *     kinglet_runtime *runtime; kinglet_model *model; kinglet_session *session;
 *     kinglet_runtime_create(&runtime);
 *     kinglet_model_load(&model, runtime, path, strlen(path), NULL);
 *     kinglet_session_create(&session, model, NULL);
 *     while (fgets(line, sizeof line, stdin))
 *         kinglet_session_send(session, line, strlen(line), NULL, NULL, print, stdout);
 *     kinglet_session_release(session); kinglet_model_release(model); kinglet_runtime_release(runtime);
 *
 * Rules that hold everywhere:
 *
 * Status. A function returns KINGLET_OK or says why not; on anything else its outputs are as they were, but for
 *   `*out`, which is NULL. KINGLET_E_ARGUMENT: a pointer is NULL that may not be, a text is not UTF-8, a size or a value is
 *   out of range. KINGLET_E_HANDLE: a handle is NULL, was released, or is of another kind. KINGLET_E_PANIC: a bug of
 *   this library; the process goes on, and if it happened in work of a session that session is KINGLET_E_POISONED from
 *   then on and can only be released. These three may come from any function and are not named again.
 *   kinglet_error_last() tells more.
 * Handles are numbers that look like pointers: never read through them. One that was released is never given out again,
 *   so a stale one is an error and not a crash. Every function may be called with any handle at any time.
 * Ownership. What a create, load, fork or start function put into `*out` is the caller's, until its release function. A
 *   release function takes NULL, does not change the last error, and may come in any order: a session keeps its model, a
 *   model its runtime. A call that is running elsewhere finishes on what it has.
 * Texts are UTF-8 with a length in bytes, and need no terminating zero. They are only read during the call. NULL with
 *   length 0 is the empty text.
 * Structs begin with their size: set `struct_size = sizeof(it)` and zero the rest, which means the defaults. A library
 *   that knows fewer fields than its caller takes them if they are zero, and one that knows more takes zero for those that
 *   its caller lacks, so that both may be updated alone. Where a params pointer is NULL all is default. A handle of 0 in
 *   a struct is "none".
 * Threads. Every function may be called from every thread. A session does one thing at a time: a second call meanwhile
 *   returns KINGLET_E_BUSY and changes nothing; so does a call from within a callback to the session that calls.
 * Callbacks run on the thread of the call, or for a request on the one thread that a runtime has for them. They must
 *   return: no longjmp, no C++ exception. What they are given is theirs until they return.
 */
#ifndef KINGLET_H
#define KINGLET_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum kinglet_status {
    KINGLET_OK = 0,
    KINGLET_E_ARGUMENT = 1,     /* see above */
    KINGLET_E_HANDLE = 2,       /* see above */
    KINGLET_E_BUSY = 3,         /* the session is at work */
    KINGLET_E_CANCELLED = 4,    /* somebody asked for it */
    KINGLET_E_TIMEOUT = 5,      /* not done yet */
    KINGLET_E_IO = 6,           /* the system refused to read or write a file */
    KINGLET_E_FILE = 7,         /* a file is damaged, or not what it should be */
    KINGLET_E_UNSUPPORTED = 8,  /* a sound file that this library cannot run */
    KINGLET_E_TEMPLATE = 9,     /* no chat template, or it refuses the messages */
    KINGLET_E_CONTEXT_FULL = 10,/* the messages do not fit into the context */
    KINGLET_E_MEMORY = 11,      /* an allocation was refused */
    KINGLET_E_BUDGET = 12,      /* the memory budget does not suffice */
    KINGLET_E_BACKEND = 13,     /* the backend failed */
    KINGLET_E_PANIC = 14,       /* see above */
    KINGLET_E_POISONED = 15,    /* see above */
    KINGLET_E_SPACE = 16        /* an array of the caller is too small */
} kinglet_status;

typedef struct kinglet_runtime kinglet_runtime; /* what the models of a process share */
typedef struct kinglet_model kinglet_model;     /* a file, mapped; any number of sessions */
typedef struct kinglet_session kinglet_session; /* one conversation */
typedef struct kinglet_request kinglet_request; /* a reply that is made in the background */
typedef struct kinglet_profile kinglet_profile; /* where the time of a run went */
typedef struct kinglet_cancel kinglet_cancel;   /* a flag that ends work from another thread */
typedef struct kinglet_buffer kinglet_buffer;   /* bytes that the library made */

/* --- Library ------------------------------------------------------------------------------------------------------ */

/* The version, "0.1.0". Static. */
const char *kinglet_version(void);

/* The name of a status, "KINGLET_E_BUSY"; "unknown" for other numbers. Static. */
const char *kinglet_status_name(kinglet_status status);

/* What went wrong in the last call of this thread that failed, in English; "" if none did. Calls that succeed and
 * release functions leave it. Valid until the next call of this thread that fails. */
const char *kinglet_error_last(void);

/* --- Buffer ------------------------------------------------------------------------------------------------------- */

/* The bytes of a buffer, valid until it is released, and never NULL. Texts are UTF-8, without a terminating zero. */
kinglet_status kinglet_buffer_data(kinglet_buffer *buffer, const char **data, size_t *len);
void kinglet_buffer_release(kinglet_buffer *buffer);

/* --- Cancel ------------------------------------------------------------------------------------------------------- */

/* A flag, not set. It may be given to any number of calls, before or while it is set: a call that finds it set ends at
 * once, so a cancel that comes early is not lost. It stays set: take a new one for what comes after.
 * A reply ends between two operations of the model, also in the middle of a long prompt: a matrix product is the longest
 * that is waited for. With 89 M weights on two cores half of the cancels took 1 ms in prefill and none more than 15 ms, in
 * decode 0.06 and 0.6 ms. Loading ends between two tensors, and within the vocabulary: 4 and 13 ms. */
kinglet_status kinglet_cancel_create(kinglet_cancel **out);
/* Sets it. Returns at once; from any thread. (Not for signal handlers: it takes a lock.) */
kinglet_status kinglet_cancel_set(kinglet_cancel *cancel);
void kinglet_cancel_release(kinglet_cancel *cancel);

/* --- Runtime ------------------------------------------------------------------------------------------------------ */

/* One is enough for a process. Starts no thread yet. */
kinglet_status kinglet_runtime_create(kinglet_runtime **out);
void kinglet_runtime_release(kinglet_runtime *runtime);

typedef enum kinglet_event {
    KINGLET_EVENT_LOW_MEMORY = 1,       /* experts leave memory, down to the least that models can work with */
    KINGLET_EVENT_BACKGROUND = 2,       /* the same, and pages of weights leave memory until they are used again */
    KINGLET_EVENT_FOREGROUND = 3,       /* weights are read ahead again */
    KINGLET_EVENT_THERMAL_NOMINAL = 4,  /* full speed */
    KINGLET_EVENT_THERMAL_SERIOUS = 5,  /* after each step replies rest for as long as it took */
    KINGLET_EVENT_THERMAL_CRITICAL = 6  /* and for three times as long */
} kinglet_event;

/* Tells what the system told the app. Work goes on: cancel what shall not. */
kinglet_status kinglet_runtime_notify(kinglet_runtime *runtime, kinglet_event event);

/* --- Model -------------------------------------------------------------------------------------------------------- */

typedef enum kinglet_repack {
    KINGLET_REPACK_AUTO = 0,    /* for models of at most four times the last-level cache and 256 MiB, where `memory` is 0 */
    KINGLET_REPACK_ON = 1,
    KINGLET_REPACK_OFF = 2
} kinglet_repack;

typedef struct kinglet_model_params {
    size_t struct_size;
    uint64_t memory;            /* bytes that this process may have in memory, all together; 0: no limit */
    uint32_t degrade;           /* 1: where they do not suffice give up speed and context, and say what; 0: refuse */
    uint32_t threads;           /* of the token loop, at most 256; 0: as many as pay */
    uint32_t threads_batch;     /* that read prompts; 0: as threads */
    uint32_t reserved;          /* 0 */
    kinglet_cancel *cancel;     /* ends the loading */
    uint32_t repack;            /* kinglet_repack: whether matrices are copied, as much memory again, to decode faster */
    uint32_t reserved_2;        /* 0 */
} kinglet_model_params;

/* Maps the GGUF file at `path`; if it is one part of a split model, all parts. Weights are read while the caller goes on. The
 * file must not change while it is in use.
 * KINGLET_E_IO, _FILE, _UNSUPPORTED, _MEMORY, _BUDGET, _CANCELLED. */
kinglet_status kinglet_model_load(kinglet_model **out, kinglet_runtime *runtime, const char *path, size_t path_len,
                                  const kinglet_model_params *params);

/* The same of a model that is `len` bytes from `offset` on in the open file `fd`; 0: up to its end. An asset of an
 * Android package that is not compressed is one: AAssetManager's, or AssetFileDescriptor's, descriptor, start and length.
 * It must be a whole model, begin at a multiple of 4 (zipalign sees to that), and be a regular file. The library keeps a
 * descriptor of its own: the caller may close `fd` at once, its position is neither used nor moved. Memory budgets and
 * experts that are read when they are used work as with a path, through the system's cache.
 * KINGLET_E_ARGUMENT (no such bytes), _IO (`fd` is not open), _UNSUPPORTED (Windows); else as kinglet_model_load. */
kinglet_status kinglet_model_load_fd(kinglet_model **out, kinglet_runtime *runtime, int fd, uint64_t offset,
                                     uint64_t len, const kinglet_model_params *params);
void kinglet_model_release(kinglet_model *model);

typedef struct kinglet_model_info {
    size_t struct_size;
    uint64_t n_params;          /* weights */
    uint64_t weight_bytes;      /* their bytes in the file */
    uint64_t n_ctx_train;       /* tokens that it was trained with */
    uint64_t n_vocab;
    uint64_t hidden;            /* width */
    uint64_t n_layers;
    uint32_t has_chat_template; /* whether kinglet_session_send works */
    uint32_t threads;           /* of the token loop */
} kinglet_model_info;

/* What it is. */
kinglet_status kinglet_model_describe(kinglet_model *model, kinglet_model_info *info);

/* Its name, in a new buffer. */
kinglet_status kinglet_model_name(kinglet_model *model, kinglet_buffer **out);

/* Gives up to `bytes` of experts back to the system, whatever runs; `*freed` (may be NULL) says how many. 0 for models
 * whose experts are all in memory, or that have none. They stay away until kinglet_model_set_memory, or until all
 * sessions have gone. */
kinglet_status kinglet_model_trim(kinglet_model *model, uint64_t bytes, uint64_t *freed);

/* Changes the `memory` that the model was loaded with, whatever runs: sessions keep what they have, weights or experts
 * get what that leaves. No bit of a reply depends on it. KINGLET_E_BUDGET: it does not suffice, nothing has changed, and
 * kinglet_error_last() says what would; KINGLET_E_ARGUMENT: the model was loaded without one. */
kinglet_status kinglet_model_set_memory(kinglet_model *model, uint64_t memory);

typedef enum kinglet_tokenize_flag {
    KINGLET_TOKENIZE_ENDS = 1,  /* with the tokens that begin and end a text, where the model wants them */
    KINGLET_TOKENIZE_CONTROL = 2 /* control tokens that are spelled out become such. Not for what users or tools say */
} kinglet_tokenize_flag;

/* The tokens of `text`, `flags` a sum of kinglet_tokenize_flag. `*n_tokens` says how many there are; with room for less,
 * `tokens_cap`, KINGLET_E_SPACE, and nothing else is written. A text has at most as many tokens as bytes, and two.
 * `tokens` may be NULL with 0. KINGLET_E_FILE (no vocabulary). */
kinglet_status kinglet_model_tokenize(kinglet_model *model, const char *text, size_t text_len, uint32_t flags,
                                      uint32_t *tokens, size_t tokens_cap, size_t *n_tokens);

/* The text of tokens, in a new buffer; control tokens have none, and bytes that are no UTF-8 become U+FFFD.
 * KINGLET_E_ARGUMENT (a number that is no token, more than 2^26), _FILE (no vocabulary). */
kinglet_status kinglet_model_detokenize(kinglet_model *model, kinglet_buffer **out, const uint32_t *tokens,
                                        size_t n_tokens);

/* --- Plan --------------------------------------------------------------------------------------------------------- */

typedef enum kinglet_kv_type {
    KINGLET_KV_DEFAULT = 0,     /* F16 */
    KINGLET_KV_F32 = 1,
    KINGLET_KV_F16 = 2,
    KINGLET_KV_Q8_0 = 3,
    KINGLET_KV_Q4_0 = 4
} kinglet_kv_type;

typedef struct kinglet_session_params {
    size_t struct_size;
    uint64_t n_ctx;             /* tokens that it can hold; 0: what the model was made for, at most 32768 */
    uint32_t batch;             /* tokens of a prompt that are read at once; 0: 512 */
    uint32_t keys;              /* kinglet_kv_type of cached keys */
    uint32_t values;            /* and of values */
    uint32_t reserved;          /* 0 */
} kinglet_session_params;

typedef struct kinglet_plan {
    size_t struct_size;
    uint64_t total;             /* bytes of the process when the context is full: the sum of those that follow */
    uint64_t weights;           /* pages of the file that stay */
    uint64_t own_weights;       /* copies */
    uint64_t experts;           /* slots of experts that are read when they are used */
    uint64_t kv;                /* keys and values */
    uint64_t conv;              /* what convolutions remember */
    uint64_t scratch;           /* activations */
    uint64_t tokenizer;
    uint64_t runtime;           /* what else is allocated */
    uint64_t program;           /* code */
    uint64_t n_ctx;             /* the session that there will be: less than asked for where memory asks for it */
    uint32_t batch;
    uint32_t keys;
    uint32_t values;
    uint32_t n_concessions;     /* things given up for the memory */
} kinglet_plan;

/* What a session on the model at `path` will take, from the header of the file alone: no weights are read.
 * `out->struct_size` must be set. As kinglet_model_load. */
kinglet_status kinglet_plan_make(kinglet_plan *out, const char *path, size_t path_len,
                                 const kinglet_model_params *model, const kinglet_session_params *session);

/* The same of a model in an open file, as kinglet_model_load_fd. */
kinglet_status kinglet_plan_make_fd(kinglet_plan *out, int fd, uint64_t offset, uint64_t len,
                                    const kinglet_model_params *model, const kinglet_session_params *session);

/* --- Session ------------------------------------------------------------------------------------------------------ */

/* An empty conversation. KINGLET_E_MEMORY, _BUDGET, _UNSUPPORTED (a cache type), _TEMPLATE (one that cannot be read). */
kinglet_status kinglet_session_create(kinglet_session **out, kinglet_model *model,
                                      const kinglet_session_params *params);
/* Returns at once; a call or a request that is running ends by itself, or by its cancel. */
void kinglet_session_release(kinglet_session *session);

typedef struct kinglet_session_info {
    size_t struct_size;
    uint64_t n_ctx;             /* tokens that it can hold */
    uint64_t n_tokens;          /* that it holds */
    uint64_t n_messages;        /* of the conversation */
    uint64_t kv;                /* bytes of keys and values */
    uint64_t conv;              /* of the memory of convolutions */
    uint64_t scratch;           /* of activations */
} kinglet_session_info;

/* What it holds. KINGLET_E_BUSY. */
kinglet_status kinglet_session_describe(kinglet_session *session, kinglet_session_info *info);

/* Sets a value of the sampler by its name: "temp", "top-k", "top-p", "min-p", "typical", "repeat-penalty",
 * "frequency-penalty", "presence-penalty", "repeat-last-n", "seed", "samplers"; as text: "0.7". A new session has what
 * its model recommends. KINGLET_E_ARGUMENT tells the range, KINGLET_E_BUSY. */
kinglet_status kinglet_session_set(kinglet_session *session, const char *name, size_t name_len, const char *value,
                                   size_t value_len);

/* Sets the system message; the empty text takes it away. KINGLET_E_TEMPLATE (no template), _BUSY. */
kinglet_status kinglet_session_set_system(kinglet_session *session, const char *text, size_t text_len);

/* The conversation as JSON in a new buffer: [{"role":"user","content":"..."}, ...]. KINGLET_E_TEMPLATE, _BUSY. */
kinglet_status kinglet_session_messages(kinglet_session *session, kinglet_buffer **out);

/* Replaces the conversation. The next reply reads what is different, from the first token that is.
 * KINGLET_E_ARGUMENT (no such JSON), _TEMPLATE, _BUSY. */
kinglet_status kinglet_session_set_messages(kinglet_session *session, const char *json, size_t json_len);

/* The tools that the model may call, a JSON list as templates expect it: [{"type":"function","function":{"name":"...",
 * "description":"...","parameters":{...a schema...}}}, ...]; the empty text or list: none. The template tells the model, if
 * it knows of tools. From then on calls are no text of the reply but chunks of their own, KINGLET_CHUNK_CALL, each told
 * when it is whole, and part of the message: as "tool_calls", or as the model wrote them if the template knows none. Calls
 * are found between <|tool_call_start|> and <|tool_call_end|> (LFM2), or <tool_call> and </tool_call> (Hermes, Qwen), in
 * Python's syntax or as JSON; what cannot be read is text. Nothing is called: that is the caller's, who then says with
 * kinglet_session_answer what came of it. Arguments are the model's words: check them.
 * KINGLET_E_ARGUMENT (no such JSON), _TEMPLATE, _BUSY. */
kinglet_status kinglet_session_set_tools(kinglet_session *session, const char *json, size_t json_len);

/* Goes back: keeps the first `n_messages`. Costs nothing; what is kept is not read again.
 * KINGLET_E_ARGUMENT (there are fewer), _TEMPLATE, _BUSY. */
kinglet_status kinglet_session_rewind(kinglet_session *session, uint64_t n_messages);

typedef struct kinglet_text {
    const char *text;
    size_t text_len;
} kinglet_text;

typedef struct kinglet_generate_params {
    size_t struct_size;
    uint64_t max_tokens;        /* of the reply; 0: until it ends or the context is full */
    const kinglet_text *stops;  /* texts that end the reply and are not part of it */
    size_t n_stops;             /* at most 64 */
    uint32_t ignore_end;        /* 1: the model may not end */
    uint32_t reserved;          /* 0 */
    kinglet_cancel *cancel;     /* ends the reply */
    const char *json_schema;    /* the reply is JSON that this schema describes; empty: anything */
    size_t json_schema_len;
    const char *grammar;        /* the reply is a text of this grammar, in llguidance's Lark; not with a schema */
    size_t grammar_len;
} kinglet_generate_params;

/* A schema (draft 2020-12, `$ref` within it) or grammar allows tokens one by one, so that a reply which ends by itself,
 * KINGLET_FINISH_STOP without a stop text, is one of its texts; one that is cut short is the beginning of one. The first
 * on a model takes some tens of ms and some MB, for a tree of the vocabulary; the last source of a model is remembered.
 * KINGLET_E_ARGUMENT: it is wrong, and kinglet_error_last() says where: "JSON schema at `/properties/age`: ...", or the
 * reply cannot go on within it. KINGLET_E_UNSUPPORTED: the library was built without the feature `grammar`. */

typedef enum kinglet_finish {
    KINGLET_FINISH_STOP = 1,    /* the model ended, or a stop text came */
    KINGLET_FINISH_LENGTH = 2,  /* max_tokens */
    KINGLET_FINISH_CANCELLED = 3, /* by a cancel or the callback */
    KINGLET_FINISH_CONTEXT_FULL = 4
} kinglet_finish;

typedef struct kinglet_reply {
    size_t struct_size;
    uint32_t finish;            /* kinglet_finish */
    uint32_t reserved;
    uint64_t prompt_tokens;     /* of the whole conversation */
    uint64_t reused_tokens;     /* those that the session held; the others were read */
    uint64_t reply_tokens;
    uint64_t prefill_ns;        /* time to read the prompt */
    uint64_t first_token_ns;    /* from the call to the first token */
    uint64_t decode_ns;         /* time of the tokens after it */
} kinglet_reply;

typedef enum kinglet_chunk_kind {
    KINGLET_CHUNK_PREFILL = 1,  /* `done` of `total` tokens of the prompt are read */
    KINGLET_CHUNK_TEXT = 2,     /* a token came and completed `text`: whole characters, often none */
    KINGLET_CHUNK_CALL = 4,     /* a token completed a call of a tool: {"name":"...","arguments":{...}} in `text` */
    KINGLET_CHUNK_END = 3       /* a request has ended with `status`; nothing follows. Blocking calls return instead */
} kinglet_chunk_kind;

typedef struct kinglet_chunk {
    uint32_t kind;              /* kinglet_chunk_kind */
    int32_t status;             /* kinglet_status */
    const char *text;
    size_t text_len;
    uint64_t done;
    uint64_t total;
} kinglet_chunk;

/* Is told about a reply; anything but 0 ends it. */
typedef int (*kinglet_on_chunk)(const kinglet_chunk *chunk, void *user);

/* Replies to `text` and returns when the reply is complete. `reply` and `on_chunk` may be NULL.
 * A reply that was cut short, by a cancel, the callback or a full context, is KINGLET_OK with its `finish`, and part of
 * the conversation as far as it came; if nothing came, `text` is taken back. On errors the conversation stays as it was.
 * KINGLET_E_TEMPLATE, _CONTEXT_FULL, _MEMORY, _IO, _BACKEND, _BUSY. */
kinglet_status kinglet_session_send(kinglet_session *session, const char *text, size_t text_len,
                                    const kinglet_generate_params *params, kinglet_reply *reply,
                                    kinglet_on_chunk on_chunk, void *user);

/* Appends messages, a JSON list as kinglet_session_messages gives it, and replies to them: what tools have answered,
 * [{"role":"tool","tool_call_id":"call_0","content":"..."}, ...]. If nothing comes they are taken back.
 * KINGLET_E_ARGUMENT (no such JSON, or an empty list); else as kinglet_session_send. */
kinglet_status kinglet_session_answer(kinglet_session *session, const char *json, size_t json_len,
                                      const kinglet_generate_params *params, kinglet_reply *reply,
                                      kinglet_on_chunk on_chunk, void *user);

/* Replaces the last reply by another one. KINGLET_E_ARGUMENT if there is nothing to reply to; else as
 * kinglet_session_send. */
kinglet_status kinglet_session_regenerate(kinglet_session *session, const kinglet_generate_params *params,
                                          kinglet_reply *reply, kinglet_on_chunk on_chunk, void *user);

/* Continues `text` as it is, without template and messages. A prompt that begins as the last one did is read from where
 * they part. As kinglet_session_send. */
kinglet_status kinglet_session_complete(kinglet_session *session, const char *text, size_t text_len,
                                        const kinglet_generate_params *params, kinglet_reply *reply,
                                        kinglet_on_chunk on_chunk, void *user);

/* Another session that holds the same and goes its own way. Keys and values are shared until either writes.
 * KINGLET_E_MEMORY, _BUDGET, _BUSY. */
kinglet_status kinglet_session_fork(kinglet_session **out, kinglet_session *session);

/* Writes messages, tokens, what the layers remember and the sampler's generator to `path`; a file there is replaced when
 * the new one is complete. Settings are not in it. KINGLET_E_IO, _TEMPLATE, _BUSY. */
kinglet_status kinglet_session_save(kinglet_session *session, const char *path, size_t path_len);

/* Goes on from such a file, or from the messages of `kinglet chat`. A file of another model gives the messages alone:
 * they are read again. The session stays as it was on errors. KINGLET_E_IO, _FILE, _CONTEXT_FULL, _TEMPLATE, _MEMORY,
 * _BUSY. */
kinglet_status kinglet_session_load(kinglet_session *session, const char *path, size_t path_len);

typedef enum kinglet_pooling {
    KINGLET_POOLING_MEAN = 1,   /* the mean of all tokens; the default */
    KINGLET_POOLING_LAST = 2,   /* the last token, which alone has seen all */
    KINGLET_POOLING_NONE = 3    /* every token: so many vectors, one after the other */
} kinglet_pooling;

typedef struct kinglet_embed_params {
    size_t struct_size;
    uint32_t pooling;           /* kinglet_pooling */
    uint32_t raw;               /* 1: not scaled to length 1 */
    kinglet_cancel *cancel;     /* ends the work */
} kinglet_embed_params;

/* `text` as one vector of kinglet_model_info.hidden floats: what the model thinks of its tokens after the last norm (hidden
 * states), pooled, scaled to length 1; or one of each token, of which kinglet_model_tokenize with KINGLET_TOKENIZE_ENDS
 * tells the number. `*out_len` says how many floats there are; with room for less, `out_cap`, KINGLET_E_SPACE before any work.
 * The session holds the text then: its messages stay, but the next reply reads them again, so take a session of its own.
 * KINGLET_E_ARGUMENT (no token), _CONTEXT_FULL, _CANCELLED, _FILE (no vocabulary), _MEMORY, _IO, _BACKEND, _BUSY. */
kinglet_status kinglet_session_embed(kinglet_session *session, const char *text, size_t text_len,
                                     const kinglet_embed_params *params, float *out, size_t out_cap,
                                     size_t *out_len);

/* --- Profile ------------------------------------------------------------------------------------------------------ */

typedef struct kinglet_profile_params {
    size_t struct_size;
    uint32_t n_prompt;          /* tokens of the prompt, at most 65536; 0: 512 */
    uint32_t n_gen;             /* of the reply; 0: 64 */
} kinglet_profile_params;

/* Loads the model at `path`, reads a prompt, writes a reply, and notes each operation: as `kinglet profile`. Takes as long
 * as that takes; `model` has the flag that ends it. As kinglet_model_load, and KINGLET_E_CONTEXT_FULL, _BACKEND. */
kinglet_status kinglet_profile_make(kinglet_profile **out, const char *path, size_t path_len,
                                    const kinglet_model_params *model, const kinglet_profile_params *params);

/* The report as JSON, in a new buffer: phases (load, prefill, decode), in each the time, bytes and kernel of each
 * operation; memory; the time of a token. The same object as `kinglet profile --json`. */
kinglet_status kinglet_profile_json(kinglet_profile *profile, kinglet_buffer **out);

/* Every operation one by one, in a new buffer: the JSON that chrome://tracing and Perfetto read. */
kinglet_status kinglet_profile_trace(kinglet_profile *profile, kinglet_buffer **out);
void kinglet_profile_release(kinglet_profile *profile);

/* --- Request ------------------------------------------------------------------------------------------------------ */

/* kinglet_session_send on the runtime's thread; requests of a runtime run one after the other, and the session is busy
 * from now on until this one has ended. `text`, `params` and stops are copied. `on_chunk` (may be NULL) and `user` must
 * live until KINGLET_CHUNK_END was told or kinglet_request_release has returned. KINGLET_E_BUSY, _MEMORY. */
kinglet_status kinglet_request_start(kinglet_request **out, kinglet_session *session, const char *text,
                                     size_t text_len, const kinglet_generate_params *params,
                                     kinglet_on_chunk on_chunk, void *user);

/* Waits until the request has ended, KINGLET_CHUNK_END included, and returns what kinglet_session_send would have: with
 * the message, and with `*reply` (may be NULL). KINGLET_E_TIMEOUT after `timeout_ms`, KINGLET_E_BUSY on the runtime's
 * thread, which would wait for itself. */
kinglet_status kinglet_request_wait(kinglet_request *request, uint32_t timeout_ms, kinglet_reply *reply);

/* Ends it, if it has not ended or begun. Returns at once; from any thread. */
kinglet_status kinglet_request_cancel(kinglet_request *request);

/* Ends it and waits for that, so that no callback comes after; from within its own callback it does not wait. */
void kinglet_request_release(kinglet_request *request);

#ifdef __cplusplus
}
#endif

#endif
