package dev.kinglet

/** Where the time of a run went. Made by [Kinglet.profile]. */
class Profile internal constructor(private val handle: Long) : AutoCloseable {
    /**
     * The report as JSON: phases (load, prefill, decode), in each the time, bytes and kernel of each operation; memory;
     * the time of a token.
     */
    fun json(): String = Native.profileJson(handle).decodeToString()

    /** Every operation one by one, as Perfetto and `chrome://tracing` read it. */
    fun trace(): String = Native.profileTrace(handle).decodeToString()

    override fun close() = Native.profileRelease(handle)
}
