package dev.kinglet

import java.io.File

/** What the system told the app. */
enum class Event(internal val code: Int) {
    /** Experts leave memory, down to the least that models can work with. */
    LOW_MEMORY(1),

    /** The same, and pages of weights leave memory until they are used again. */
    BACKGROUND(2),

    /** Weights are read ahead again. */
    FOREGROUND(3),

    /** Full speed. */
    THERMAL_NOMINAL(4),

    /** After each step replies rest for as long as it took. */
    THERMAL_SERIOUS(5),

    /** And for three times as long. */
    THERMAL_CRITICAL(6),
}

/** How a model is loaded. */
data class ModelOptions(
    /** Bytes that this process may have in memory, all together; 0: no limit. */
    val memory: Long = 0,
    /** Where they do not suffice give up speed and context; else loading fails with [Status.BUDGET]. */
    val degrade: Boolean = false,
    /** Threads of the token loop; 0: as many as pay. */
    val threads: Int = 0,
    /** Threads that read prompts; 0: as [threads]. */
    val threadsBatch: Int = 0,
) {
    init {
        require(memory >= 0) { "memory: expected 0 or more, found $memory" }
    }
}

/** In how many bits keys or values are cached. */
enum class KvType(internal val code: Int) { DEFAULT(0), F32(1), F16(2), Q8_0(3), Q4_0(4) }

/** How a session is made. */
data class SessionOptions(
    /** Tokens that it can hold; 0: what the model was made for, at most 32768. */
    val nCtx: Long = 0,
    /** Tokens of a prompt that are read at once; 0: 512. */
    val batch: Int = 0,
    val keys: KvType = KvType.DEFAULT,
    val values: KvType = KvType.DEFAULT,
) {
    init {
        require(nCtx >= 0) { "nCtx: expected 0 or more, found $nCtx" }
    }
}

/** Bytes that a process will have in memory when the context is full, and the session that there will be. */
data class Plan(
    val total: Long,
    val weights: Long,
    val ownWeights: Long,
    val experts: Long,
    val kv: Long,
    val conv: Long,
    val scratch: Long,
    val tokenizer: Long,
    val runtime: Long,
    val program: Long,
    val nCtx: Long,
    val batch: Int,
    val keys: KvType,
    val values: KvType,
    /** Things given up for the memory. */
    val nConcessions: Int,
)

/**
 * Where an app gets its model from: the library has no network code. An app with WorkManager waits for its work here.
 */
fun interface ModelSource {
    /**
     * The file, complete. Tells [progress] bytes so far and of all, 0 where that is not known. When it is cancelled
     * it may keep what it has, to go on with next time; a file that is not complete must have another name.
     */
    suspend fun file(progress: (done: Long, total: Long) -> Unit): File
}

/**
 * What the models of a process share; one is enough. Every object may be used from every thread and closed in any
 * order: a session keeps its model, a model its runtime, and one that was closed fails with [Status.HANDLE]. Close
 * what you open; the garbage collector does not.
 */
class Kinglet : AutoCloseable {
    internal val handle = Native.runtimeCreate()

    /** Maps the GGUF file; it must not change while the model is in use. Ends soon after the coroutine is cancelled. */
    suspend fun load(file: File, options: ModelOptions = ModelOptions()): Model =
        blocking(undo = Model::close) { cancel ->
            val path = file.path.encodeToByteArray()
            with(options) { Model(Native.modelLoad(handle, path, memory, degrade, threads, threadsBatch, cancel)) }
        }

    /**
     * The same of a model that is [length] bytes from [offset] on in the open file whose descriptor is [fd]; 0: up to its
     * end. An asset that is not compressed is one: `dev.kinglet.android` has a [load] for Android's descriptors. The
     * library keeps a descriptor of its own, so that [fd] may be closed when this returns.
     */
    suspend fun loadFd(
        fd: Int, offset: Long = 0, length: Long = 0, options: ModelOptions = ModelOptions(),
    ): Model {
        requireRange(offset, length)
        return blocking(undo = Model::close) { cancel ->
            with(options) {
                Model(Native.modelLoadFd(handle, fd, offset, length, memory, degrade, threads, threadsBatch, cancel))
            }
        }
    }

    /** The same with a file that may have to be fetched. */
    suspend fun load(
        source: ModelSource,
        options: ModelOptions = ModelOptions(),
        progress: (done: Long, total: Long) -> Unit = { _, _ -> },
    ): Model = load(source.file(progress), options)

    /** Tells what the system told the app. Work goes on: cancel what shall not. */
    fun notify(event: Event) = Native.runtimeNotify(handle, event.code)

    override fun close() = Native.runtimeRelease(handle)

    companion object {
        /** The version of the library. */
        val version: String get() = Native.version().decodeToString()

        /** What a session on the model in [file] will take, from its header alone. */
        suspend fun plan(
            file: File,
            model: ModelOptions = ModelOptions(),
            session: SessionOptions = SessionOptions(),
        ): Plan = blocking {
            planOf(
                Native.planMake(
                    file.path.encodeToByteArray(), model.memory, model.degrade, model.threads, model.threadsBatch,
                    session.nCtx, session.batch, session.keys.code, session.values.code,
                ),
            )
        }

        /** The same of a model in an open file, as [loadFd]. */
        suspend fun planFd(
            fd: Int,
            offset: Long = 0,
            length: Long = 0,
            model: ModelOptions = ModelOptions(),
            session: SessionOptions = SessionOptions(),
        ): Plan {
            requireRange(offset, length)
            return blocking {
                planOf(
                    Native.planMakeFd(
                        fd, offset, length, model.memory, model.degrade, model.threads, model.threadsBatch,
                        session.nCtx, session.batch, session.keys.code, session.values.code,
                    ),
                )
            }
        }

        /**
         * Loads the model in [file], reads a prompt, writes a reply, and notes each operation. Takes as long as that
         * takes, or until it is cancelled. The numbers of tokens are at most 65,536; 0: 512 and 64.
         */
        suspend fun profile(
            file: File, model: ModelOptions = ModelOptions(), nPrompt: Int = 0, nGen: Int = 0,
        ): Profile = blocking(undo = Profile::close) { cancel ->
            val path = file.path.encodeToByteArray()
            with(model) {
                Profile(
                    Native.profileMake(path, memory, degrade, threads, threadsBatch, nPrompt, nGen, cancel),
                )
            }
        }

        private fun requireRange(offset: Long, length: Long) =
            require(offset >= 0 && length >= 0) { "offset, length: expected 0 or more, found $offset, $length" }

        private fun planOf(n: LongArray) = Plan(
            n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11].toInt(),
            KvType.entries[n[12].toInt()], KvType.entries[n[13].toInt()], n[14].toInt(),
        )
    }
}
