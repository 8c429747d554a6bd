package dev.kinglet

import java.io.File
import kotlin.time.Duration
import kotlin.time.Duration.Companion.nanoseconds
import kotlinx.coroutines.channels.trySendBlocking
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.channelFlow

/**
 * What a reply must be. Tokens are allowed one by one, so that a reply which ends by itself is one of the texts, and one
 * that is cut short the beginning of one. One that is wrong fails with [Status.ARGUMENT], and says where; a native library
 * that was built without the feature `grammar` fails with [Status.UNSUPPORTED].
 */
sealed interface ReplyFormat {
    /** JSON that [schema] (draft 2020-12, `$ref` within it) describes. */
    data class JsonSchema(val schema: String) : ReplyFormat {
        init {
            require(schema.isNotEmpty()) { "schema: expected JSON, found an empty text" }
        }
    }

    /** A text of the grammar [lark], in llguidance's variant of Lark. */
    data class Grammar(val lark: String) : ReplyFormat {
        init {
            require(lark.isNotEmpty()) { "lark: expected a grammar, found an empty text" }
        }
    }
}

/** What a reply may be, and when it ends. */
data class ReplyOptions(
    /** Tokens of the reply; 0: until it ends or the context is full. */
    val maxTokens: Long = 0,
    /** Texts that end the reply and are not part of it; at most 64. */
    val stops: List<String> = emptyList(),
    /** The model may not end. */
    val ignoreEnd: Boolean = false,
    /** What the reply must be; anything by default. */
    val format: ReplyFormat? = null,
) {
    init {
        require(maxTokens >= 0) { "maxTokens: expected 0 or more, found $maxTokens" }
    }
}

/** Why a reply ended. */
enum class Finish {
    /** The model ended, or a stop text came. */
    STOP,

    /** [ReplyOptions.maxTokens]. */
    LENGTH,

    /** By the callback. */
    CANCELLED,
    CONTEXT_FULL,
}

/** What a reply was. */
data class Reply(
    val finish: Finish,
    /** Tokens of the whole conversation. */
    val promptTokens: Long,
    /** Those that the session held; the others were read. */
    val reusedTokens: Long,
    val replyTokens: Long,
    /** Time to read the prompt. */
    val prefill: Duration,
    /** From the call to the first token. */
    val firstToken: Duration,
    /** Of the tokens after it. */
    val decode: Duration,
)

/** A piece of a reply. */
sealed interface Chunk {
    /** So many tokens of the prompt are read. */
    data class Prefill(val done: Long, val total: Long) : Chunk

    /** Whole characters, in order. */
    data class Text(val text: String) : Chunk

    /**
     * A call of a tool, `{"name":"...","arguments":{...}}`, when it is whole; see [Session.setTools]. Arguments are the
     * model's words: check them.
     */
    data class Call(val json: String) : Chunk

    /** The last one. */
    data class End(val reply: Reply) : Chunk
}

/** How the hidden states of tokens become one vector. */
enum class Pooling(internal val code: Int) {
    /** Their mean. */
    MEAN(1),

    /** That of the last token, which alone has seen all. */
    LAST(2),
}

/** What a session holds. */
data class SessionInfo(
    val nCtx: Long,
    val nTokens: Long,
    val nMessages: Long,
    val kvBytes: Long,
    val convBytes: Long,
    val scratchBytes: Long,
)

/**
 * One conversation. It does one thing at a time: a second call meanwhile fails with [Status.BUSY] and changes nothing.
 * Made by [Model.session].
 */
class Session internal constructor(internal val handle: Long, private val hidden: Int) : AutoCloseable {
    /**
     * Replies to [text], anew for each collector. Whoever stops to collect stops the reply: what came is part of the
     * conversation, and the session is free when the collector's call has ended. A collector that is slow slows the
     * reply.
     */
    fun send(text: String, options: ReplyOptions = ReplyOptions()): Flow<Chunk> = flow(Native.SEND, text, options)

    /** Replaces the last reply by another one. */
    fun regenerate(options: ReplyOptions = ReplyOptions()): Flow<Chunk> = flow(Native.REGENERATE, null, options)

    /**
     * Appends [messages], JSON as [messages] gives it, and replies to them: what tools have answered,
     * `[{"role":"tool","tool_call_id":"call_0","content":"..."}, ...]`.
     */
    fun answer(messages: String, options: ReplyOptions = ReplyOptions()): Flow<Chunk> =
        flow(Native.ANSWER, messages, options)

    /** Continues [text] as it is, without template and messages. */
    fun complete(text: String, options: ReplyOptions = ReplyOptions()): Flow<Chunk> =
        flow(Native.COMPLETE, text, options)

    /**
     * Replies on this thread, and returns when the reply is complete: for Java, and threads of one's own. [onChunk]
     * is told what comes; false ends the reply, and so does what it throws, which is then thrown from here.
     */
    @JvmOverloads
    fun sendBlocking(text: String, options: ReplyOptions = ReplyOptions(), onChunk: (Chunk) -> Boolean): Reply =
        reply(Native.SEND, text, options, 0, onChunk)

    private fun flow(how: Int, text: String?, options: ReplyOptions): Flow<Chunk> = channelFlow {
        val reply = blocking { cancel ->
            reply(how, text, options, cancel) { chunk -> trySendBlocking(chunk).isSuccess }
        }
        send(Chunk.End(reply))
    }

    private fun reply(
        how: Int, text: String?, options: ReplyOptions, cancel: Long, onChunk: (Chunk) -> Boolean,
    ): Reply {
        val stops = options.stops.map(String::encodeToByteArray)
        val n = Native.sessionReply(
            handle, how, text?.encodeToByteArray(), options.maxTokens,
            stops.fold(ByteArray(0), ByteArray::plus), IntArray(stops.size) { stops[it].size },
            options.ignoreEnd, (options.format as? ReplyFormat.JsonSchema)?.schema?.encodeToByteArray(),
            (options.format as? ReplyFormat.Grammar)?.lark?.encodeToByteArray(), cancel,
        ) { kind, bytes, done, total ->
            when {
                kind == Native.PREFILL -> onChunk(Chunk.Prefill(done, total))
                // Empty where a token completed no character.
                kind == Native.TEXT && bytes?.isNotEmpty() == true -> onChunk(Chunk.Text(bytes.decodeToString()))
                kind == Native.CALL && bytes != null -> onChunk(Chunk.Call(bytes.decodeToString()))
                else -> true
            }
        }
        return Reply(
            Finish.entries[n[0].toInt() - 1], n[1], n[2], n[3], n[4].nanoseconds, n[5].nanoseconds, n[6].nanoseconds,
        )
    }

    /** What it holds. */
    fun info(): SessionInfo {
        val n = Native.sessionDescribe(handle)
        return SessionInfo(n[0], n[1], n[2], n[3], n[4], n[5])
    }

    /** Sets a value of the sampler by its name, as `kinglet_session_set` lists them: `set("temp", "0.7")`. */
    fun set(name: String, value: String) =
        Native.sessionSet(handle, name.encodeToByteArray(), value.encodeToByteArray())

    /** Sets the system message; the empty text takes it away. */
    fun setSystem(text: String) = Native.sessionSetSystem(handle, text.encodeToByteArray())

    /** The conversation as JSON: `[{"role":"user","content":"..."}, ...]`. */
    fun messages(): String = Native.sessionMessages(handle).decodeToString()

    /** Replaces the conversation. The next reply reads what is different, from the first token that is. */
    fun setMessages(json: String) = Native.sessionSetMessages(handle, json.encodeToByteArray())

    /**
     * The tools that the model may call, as JSON in the form of templates:
     * `[{"type":"function","function":{"name":"...","description":"...","parameters":{...a schema...}}}, ...]`; the empty
     * text: none. From then on calls are no text of the reply but a [Chunk.Call] each. Nothing is called: that is the
     * app's, which then says with [answer] what came of it.
     */
    fun setTools(json: String) = Native.sessionSetTools(handle, json.encodeToByteArray())

    /** Goes back: keeps the first [nMessages]. Costs nothing; what is kept is not read again. */
    fun rewind(nMessages: Long) = Native.sessionRewind(handle, nMessages)

    /** Another session that holds the same and goes its own way. */
    suspend fun fork(): Session = blocking(undo = Session::close) { Session(Native.sessionFork(handle), hidden) }

    /**
     * [text] as one vector of [ModelInfo.hidden] numbers, of length 1 if [normalize] says so. The session holds the text
     * then: its messages stay, but the next reply reads them again, so take a session of its own.
     */
    suspend fun embed(text: String, pooling: Pooling = Pooling.MEAN, normalize: Boolean = true): FloatArray =
        blocking { cancel ->
            Native.sessionEmbed(handle, text.encodeToByteArray(), pooling.code, !normalize, cancel)
        }

    /** The same with a vector for each token: those of [Model.tokenize] with `ends`. */
    suspend fun hiddenStates(text: String, normalize: Boolean = false): List<FloatArray> = blocking { cancel ->
        val all = Native.sessionEmbed(handle, text.encodeToByteArray(), Native.EACH, !normalize, cancel)
        List(all.size / hidden) { all.copyOfRange(it * hidden, (it + 1) * hidden) }
    }

    /**
     * Writes the conversation and all that the model remembers of it; a file there is replaced when the new one is
     * complete.
     */
    suspend fun save(file: File) = blocking { Native.sessionSave(handle, file.path.encodeToByteArray()) }

    /** Goes on from such a file. The session stays as it was if it fails. */
    suspend fun restore(file: File) = blocking { Native.sessionLoad(handle, file.path.encodeToByteArray()) }

    /** Returns at once; a reply that is being made ends by itself, or by its collector. */
    override fun close() = Native.sessionRelease(handle)
}
