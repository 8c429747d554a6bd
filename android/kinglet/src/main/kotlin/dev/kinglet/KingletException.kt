package dev.kinglet

/** Why a call failed, as `kinglet.h` names and numbers it. */
enum class Status(internal val code: Int) {
    /** A text, a size or a value is out of range. */
    ARGUMENT(1),

    /** The object was closed. */
    HANDLE(2),

    /** The session is at work. */
    BUSY(3),

    /** The work was cancelled. */
    CANCELLED(4),

    /** Not done yet. */
    TIMEOUT(5),

    /** The system refused to read or write a file. */
    IO(6),

    /** A file is damaged, or not what it should be. */
    FILE(7),

    /** A sound file that this library cannot run. */
    UNSUPPORTED(8),

    /** No chat template, or it refuses the messages. */
    TEMPLATE(9),

    /** The messages do not fit into the context. */
    CONTEXT_FULL(10),

    /** An allocation was refused. */
    MEMORY(11),

    /** The memory budget does not suffice. */
    BUDGET(12),

    /** The backend failed. */
    BACKEND(13),

    /** A bug of the library; the process goes on. */
    PANIC(14),

    /** A bug has ended this session; it can only be closed. */
    POISONED(15),

    /** An array of the caller is too small. */
    SPACE(16),

    /** One that this version does not know. */
    UNKNOWN(-1),
}

/** A call of the library failed. [message] tells what was expected and what was found. */
class KingletException internal constructor(val status: Status, message: String) : Exception(message) {
    /** As the native layer makes it. */
    internal constructor(code: Int, message: ByteArray) : this(
        Status.entries.find { it.code == code } ?: Status.UNKNOWN,
        message.decodeToString(),
    )
}
