package dev.kinglet.sample

import android.content.Context
import android.net.Uri
import dev.kinglet.ModelSource
import java.io.File
import java.io.IOException
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.ensureActive
import kotlinx.coroutines.withContext

/**
 * A document that the user chose, copied to where it can be mapped. An app that downloads has its own [ModelSource].
 */
class CopiedModel(private val context: Context, private val document: Uri) : ModelSource {
    override suspend fun file(progress: (done: Long, total: Long) -> Unit): File = withContext(Dispatchers.IO) {
        val part = File(context.filesDir, "model.gguf.part")
        val complete = fileIn(context)
        val descriptor = context.contentResolver.openAssetFileDescriptor(document, "r")
        (descriptor ?: throw IOException("$document is empty")).use {
            val total = it.length.coerceAtLeast(0)
            it.createInputStream().use { from ->
                part.outputStream().use { to ->
                    val bytes = ByteArray(1 shl 20)
                    var done = 0L
                    while (true) {
                        ensureActive()
                        val n = from.read(bytes)
                        if (n < 0) break
                        to.write(bytes, 0, n)
                        done += n
                        progress(done, total)
                    }
                }
            }
        }
        if (!part.renameTo(complete)) throw IOException("$part: cannot be renamed")
        complete
    }

    companion object {
        /** Where a copy is, once there is one. */
        fun fileIn(context: Context) = File(context.filesDir, "model.gguf")
    }
}
