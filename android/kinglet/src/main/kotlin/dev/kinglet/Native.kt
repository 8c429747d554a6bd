package dev.kinglet

/** The functions of `kinglet_jni.c`. They throw [KingletException]; texts are UTF-8, handles numbers. */
internal object Native {
    init {
        System.loadLibrary("kinglet_jni")
    }

    /** What a reply tells; false ends it. */
    fun interface Sink {
        fun tell(kind: Int, text: ByteArray?, done: Long, total: Long): Boolean
    }

    const val SEND = 0
    const val REGENERATE = 1
    const val COMPLETE = 2
    const val ANSWER = 3

    /** Kinds of chunks. Later ones are not told to an app that does not know them. */
    const val PREFILL = 1
    const val TEXT = 2
    const val CALL = 4

    /** `kinglet_tokenize_flag`. */
    const val ENDS = 1
    const val CONTROL = 2

    /** The `kinglet_pooling` that is none. */
    const val EACH = 3

    @JvmStatic external fun version(): ByteArray

    @JvmStatic external fun cancelCreate(): Long
    @JvmStatic external fun cancelSet(cancel: Long)
    @JvmStatic external fun cancelRelease(cancel: Long)

    @JvmStatic external fun runtimeCreate(): Long
    @JvmStatic external fun runtimeRelease(runtime: Long)
    @JvmStatic external fun runtimeNotify(runtime: Long, event: Int)

    @JvmStatic external fun modelLoad(
        runtime: Long, path: ByteArray, memory: Long, degrade: Boolean, threads: Int, threadsBatch: Int, cancel: Long,
    ): Long
    @JvmStatic external fun modelLoadFd(
        runtime: Long, fd: Int, offset: Long, length: Long,
        memory: Long, degrade: Boolean, threads: Int, threadsBatch: Int, cancel: Long,
    ): Long
    @JvmStatic external fun modelRelease(model: Long)
    @JvmStatic external fun modelDescribe(model: Long): LongArray
    @JvmStatic external fun modelName(model: Long): ByteArray
    @JvmStatic external fun modelTrim(model: Long, bytes: Long): Long
    @JvmStatic external fun modelSetMemory(model: Long, memory: Long)
    @JvmStatic external fun modelTokenize(model: Long, text: ByteArray, flags: Int): IntArray
    @JvmStatic external fun modelDetokenize(model: Long, tokens: IntArray): ByteArray
    @JvmStatic external fun planMake(
        path: ByteArray, memory: Long, degrade: Boolean, threads: Int, threadsBatch: Int,
        nCtx: Long, batch: Int, keys: Int, values: Int,
    ): LongArray

    @JvmStatic external fun planMakeFd(
        fd: Int, offset: Long, length: Long, memory: Long, degrade: Boolean, threads: Int, threadsBatch: Int,
        nCtx: Long, batch: Int, keys: Int, values: Int,
    ): LongArray

    @JvmStatic external fun profileMake(
        path: ByteArray, memory: Long, degrade: Boolean, threads: Int, threadsBatch: Int,
        nPrompt: Int, nGen: Int, cancel: Long,
    ): Long
    @JvmStatic external fun profileJson(profile: Long): ByteArray
    @JvmStatic external fun profileTrace(profile: Long): ByteArray
    @JvmStatic external fun profileRelease(profile: Long)

    @JvmStatic external fun sessionCreate(model: Long, nCtx: Long, batch: Int, keys: Int, values: Int): Long
    @JvmStatic external fun sessionRelease(session: Long)
    @JvmStatic external fun sessionDescribe(session: Long): LongArray
    @JvmStatic external fun sessionSet(session: Long, name: ByteArray, value: ByteArray)
    @JvmStatic external fun sessionSetSystem(session: Long, text: ByteArray)
    @JvmStatic external fun sessionMessages(session: Long): ByteArray
    @JvmStatic external fun sessionSetMessages(session: Long, json: ByteArray)
    @JvmStatic external fun sessionSetTools(session: Long, json: ByteArray)
    @JvmStatic external fun sessionRewind(session: Long, nMessages: Long)
    @JvmStatic external fun sessionFork(session: Long): Long
    @JvmStatic external fun sessionSave(session: Long, path: ByteArray)
    @JvmStatic external fun sessionLoad(session: Long, path: ByteArray)
    @JvmStatic external fun sessionEmbed(
        session: Long, text: ByteArray, pooling: Int, raw: Boolean, cancel: Long,
    ): FloatArray
    @JvmStatic external fun sessionReply(
        session: Long, how: Int, prompt: ByteArray?, maxTokens: Long, stops: ByteArray, stopLengths: IntArray,
        ignoreEnd: Boolean, schema: ByteArray?, grammar: ByteArray?, cancel: Long, sink: Sink,
    ): LongArray
}
