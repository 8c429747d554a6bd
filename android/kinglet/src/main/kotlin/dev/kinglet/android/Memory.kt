package dev.kinglet.android

import android.content.ComponentCallbacks2
import android.content.Context
import android.content.res.Configuration
import dev.kinglet.Event
import dev.kinglet.Kinglet
import dev.kinglet.KingletException

/** Tells a runtime what Android tells apps about memory. */
class MemoryCallbacks(private val kinglet: Kinglet) : ComponentCallbacks2 {
    override fun onTrimMemory(level: Int) {
        // Levels grow with urgency from "the screen is hidden" on; those below it are of an app in front.
        tell(if (level >= ComponentCallbacks2.TRIM_MEMORY_UI_HIDDEN) Event.BACKGROUND else Event.LOW_MEMORY)
    }

    @Deprecated("Old name of the most urgent level", ReplaceWith("onTrimMemory(level)"))
    override fun onLowMemory() = tell(Event.LOW_MEMORY)

    override fun onConfigurationChanged(newConfig: Configuration) = Unit

    private fun tell(event: Event) {
        try {
            kinglet.notify(event)
        } catch (_: KingletException) {
            // It was closed: there is nothing to give back.
        }
    }
}

/**
 * Registers [MemoryCallbacks] with the app, until what it returns is closed. Nobody tells them that the app is in
 * front again: an activity's `onStart` may, by [Event.FOREGROUND]; what is used comes back in any case.
 */
fun Kinglet.followMemory(context: Context): AutoCloseable {
    val callbacks = MemoryCallbacks(this)
    val app = context.applicationContext
    app.registerComponentCallbacks(callbacks)
    return AutoCloseable { app.unregisterComponentCallbacks(callbacks) }
}
