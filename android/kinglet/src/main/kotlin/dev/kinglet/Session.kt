package dev.kinglet

import java.io.File
import kotlin.time.Duration
import kotlin.time.Duration.Companion.nanoseconds
import kotlinx.coroutines.channels.trySendBlocking
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.channelFlow

/** When a reply ends. */
data class ReplyOptions(
    /** Tokens of the reply; 0: until it ends or the context is full. */
    val maxTokens: Long = 0,
    /** Texts that end the reply and are not part of it; at most 64. */
    val stops: List<String> = emptyList(),
    /** The model may not end. */
    val ignoreEnd: Boolean = false,
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

    /** The last one. */
    data class End(val reply: Reply) : Chunk
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
class Session internal constructor(internal val handle: Long) : AutoCloseable {
    /**
     * Replies to [text], anew for each collector. Whoever stops to collect stops the reply: what came is part of the
     * conversation, and the session is free when the collector's call has ended. A collector that is slow slows the
     * reply.
     */
    fun send(text: String, options: ReplyOptions = ReplyOptions()): Flow<Chunk> = flow(Native.SEND, text, options)

    /** Replaces the last reply by another one. */
    fun regenerate(options: ReplyOptions = ReplyOptions()): Flow<Chunk> = flow(Native.REGENERATE, null, options)

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
            options.ignoreEnd, cancel,
        ) { kind, bytes, done, total ->
            when {
                kind == Native.PREFILL -> onChunk(Chunk.Prefill(done, total))
                // Empty where a token completed no character.
                kind == Native.TEXT && bytes?.isNotEmpty() == true -> onChunk(Chunk.Text(bytes.decodeToString()))
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

    /** Goes back: keeps the first [nMessages]. Costs nothing; what is kept is not read again. */
    fun rewind(nMessages: Long) = Native.sessionRewind(handle, nMessages)

    /** Another session that holds the same and goes its own way. */
    suspend fun fork(): Session = blocking(undo = Session::close) { Session(Native.sessionFork(handle)) }

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
