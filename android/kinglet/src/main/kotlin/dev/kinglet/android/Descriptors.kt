package dev.kinglet.android

import android.content.res.AssetFileDescriptor
import android.os.ParcelFileDescriptor
import dev.kinglet.Kinglet
import dev.kinglet.Model
import dev.kinglet.ModelOptions
import dev.kinglet.Plan
import dev.kinglet.SessionOptions

/** Bytes of an asset, where 0 is up to the end of its file. */
private val AssetFileDescriptor.bytes: Long
    get() = if (declaredLength == AssetFileDescriptor.UNKNOWN_LENGTH) 0 else declaredLength

/**
 * Maps the model in [asset], which `AssetManager.openFd` gives for one that is not compressed (`noCompress += "gguf"`) and
 * zipalign has aligned. It may be closed when this returns.
 */
suspend fun Kinglet.load(asset: AssetFileDescriptor, options: ModelOptions = ModelOptions()): Model =
    loadFd(asset.parcelFileDescriptor.fd, asset.startOffset, asset.bytes, options)

/** Maps the model that is a regular file, such as `ContentResolver.openFileDescriptor` gives; it may be closed then. */
suspend fun Kinglet.load(file: ParcelFileDescriptor, options: ModelOptions = ModelOptions()): Model =
    loadFd(file.fd, options = options)

/** What a session on the model in [asset] will take, from its header alone. */
suspend fun Kinglet.Companion.plan(
    asset: AssetFileDescriptor,
    model: ModelOptions = ModelOptions(),
    session: SessionOptions = SessionOptions(),
): Plan = planFd(asset.parcelFileDescriptor.fd, asset.startOffset, asset.bytes, model, session)

/** The same of a regular file. */
suspend fun Kinglet.Companion.plan(
    file: ParcelFileDescriptor,
    model: ModelOptions = ModelOptions(),
    session: SessionOptions = SessionOptions(),
): Plan = planFd(file.fd, model = model, session = session)
