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

/** A file, mapped; for any number of sessions. Made by [Kinglet.load]. */
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
            with(options) { Session(Native.sessionCreate(handle, nCtx, batch, keys.code, values.code)) }
        }

    /** Gives up to [bytes] of experts back to the system, whatever runs; how many it gave. */
    fun trim(bytes: Long = Long.MAX_VALUE): Long = Native.modelTrim(handle, bytes)

    override fun close() = Native.modelRelease(handle)
}
