package dev.kinglet

/** What a model is. */
data class ModelInfo(
    val name: String,
    val nParams: Long,
    val weightBytes: Long,
    val nCtxTrain: Long,
    val nVocab: Long,
    val hidden: Long,
    val nLayers: Long,
    /** Whether [Session.send] works. */
    val hasChatTemplate: Boolean,
    val threads: Int,
)

/** A file, mapped; for any number of sessions. Made by [Kinglet.load] and [Kinglet.loadFd]. */
class Model internal constructor(internal val handle: Long) : AutoCloseable {
    /** What it is. */
    fun info(): ModelInfo {
        val n = Native.modelDescribe(handle)
        return ModelInfo(
            Native.modelName(handle).decodeToString(), n[0], n[1], n[2], n[3], n[4], n[5], n[6] != 0L, n[7].toInt(),
        )
    }

    /** An empty conversation. */
    suspend fun session(options: SessionOptions = SessionOptions()): Session =
        blocking(undo = Session::close) {
            val hidden = info().hidden.toInt()
            with(options) { Session(Native.sessionCreate(handle, nCtx, batch, keys.code, values.code), hidden) }
        }

    /** Gives up to [bytes] of experts back to the system, whatever runs; how many it gave. */
    fun trim(bytes: Long = Long.MAX_VALUE): Long = Native.modelTrim(handle, bytes)

    /**
     * Changes the [ModelOptions.memory] that the model was loaded with, whatever runs: sessions keep what they have,
     * weights or experts get what that leaves. No bit of a reply depends on it. [Status.BUDGET]: it does not suffice,
     * and nothing has changed; [Status.ARGUMENT]: the model was loaded without one.
     */
    suspend fun setMemory(bytes: Long) {
        require(bytes > 0) { "memory: expected more than 0, found $bytes" }
        blocking { Native.modelSetMemory(handle, bytes) }
    }

    /**
     * The tokens of [text]. With [ends] those too that begin and end a text, where the model wants them; with
     * [control] control tokens that are spelled out become such, which is not for what users or tools say.
     */
    fun tokenize(text: String, ends: Boolean = false, control: Boolean = false): IntArray {
        val flags = (if (ends) Native.ENDS else 0) or (if (control) Native.CONTROL else 0)
        return Native.modelTokenize(handle, text.encodeToByteArray(), flags)
    }

    /** The text of [tokens]. Control tokens have none, and bytes that are no UTF-8 become U+FFFD. */
    fun detokenize(tokens: IntArray): String = Native.modelDetokenize(handle, tokens).decodeToString()

    override fun close() = Native.modelRelease(handle)
}
