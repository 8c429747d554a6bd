package dev.kinglet

import kotlinx.coroutines.CoroutineStart
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.ExperimentalCoroutinesApi
import kotlinx.coroutines.NonCancellable
import kotlinx.coroutines.awaitCancellation
import kotlinx.coroutines.coroutineScope
import kotlinx.coroutines.currentCoroutineContext
import kotlinx.coroutines.ensureActive
import kotlinx.coroutines.launch
import kotlinx.coroutines.withContext

/** Threads for what blocks. Not those of the app: a reply may wait for its collector, who may need one of them. */
@OptIn(ExperimentalCoroutinesApi::class)
private val threads = Dispatchers.IO.limitedParallelism(64)

/**
 * Runs [work], which blocks, on a thread of its own. A cancel of the coroutine sets the flag that [work] is given,
 * and the coroutine ends when [work] has: nothing of it is left running behind. A result that nobody receives any
 * more goes to [undo].
 */
internal suspend fun <T> blocking(undo: (T) -> Unit = {}, work: (cancel: Long) -> T): T {
    val cancel = Native.cancelCreate()
    var done: Result<T>? = null
    try {
        return coroutineScope {
            // In the thread of whoever cancels, so that it does not wait for one that is free; and even if that was
            // before.
            val watch = launch(Dispatchers.Unconfined, CoroutineStart.UNDISPATCHED) {
                try {
                    awaitCancellation()
                } finally {
                    Native.cancelSet(cancel)
                }
            }
            // Noted there: on its way back to a coroutine that was cancelled a result gets lost.
            val result = withContext(NonCancellable + threads) { work(cancel).also { done = Result.success(it) } }
            watch.cancel()
            result
        }
    } catch (e: Throwable) {
        done?.onSuccess(undo)
        // What was cancelled says so, whatever its work said.
        currentCoroutineContext().ensureActive()
        throw e
    } finally {
        Native.cancelRelease(cancel)
    }
}
