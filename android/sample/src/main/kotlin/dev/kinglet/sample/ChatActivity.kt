package dev.kinglet.sample

import android.app.Activity
import android.content.Intent
import android.os.Bundle
import android.view.View
import android.view.ViewGroup.LayoutParams.MATCH_PARENT
import android.view.ViewGroup.LayoutParams.WRAP_CONTENT
import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.ScrollView
import android.widget.TextView
import dev.kinglet.Chunk
import dev.kinglet.Event
import dev.kinglet.Kinglet
import dev.kinglet.KingletException
import dev.kinglet.Model
import dev.kinglet.ModelOptions
import dev.kinglet.ModelSource
import dev.kinglet.Session
import dev.kinglet.SessionOptions
import dev.kinglet.android.followMemory
import java.io.IOException
import kotlinx.coroutines.Job
import kotlinx.coroutines.MainScope
import kotlinx.coroutines.cancel
import kotlinx.coroutines.launch

/** A conversation with a model that the user chooses once. */
class ChatActivity : Activity() {
    private val scope = MainScope()
    private val kinglet = Kinglet()
    private lateinit var memory: AutoCloseable
    private var model: Model? = null
    private var session: Session? = null
    private var reply: Job? = null

    private lateinit var state: TextView
    private lateinit var log: TextView
    private lateinit var scroll: ScrollView
    private lateinit var draft: EditText
    private lateinit var send: Button

    override fun onCreate(saved: Bundle?) {
        super.onCreate(saved)
        memory = kinglet.followMemory(this)
        setContentView(screen())
        val copy = CopiedModel.fileIn(this)
        if (copy.exists()) open { copy } else state.text = "Choose a GGUF file"
    }

    override fun onStart() {
        super.onStart()
        kinglet.notify(Event.FOREGROUND)
    }

    override fun onDestroy() {
        scope.cancel()
        memory.close()
        session?.close()
        model?.close()
        kinglet.close()
        super.onDestroy()
    }

    private fun screen(): View {
        state = TextView(this)
        log = TextView(this).apply { setTextIsSelectable(true) }
        scroll = ScrollView(this).apply { addView(log) }
        draft = EditText(this).apply { hint = "Message" }
        send = Button(this).apply { setOnClickListener { if (reply == null) send() else reply?.cancel() } }
        val choose = Button(this).apply {
            text = "Model"
            setOnClickListener { choose() }
        }
        showIdle()
        return LinearLayout(this).apply {
            orientation = LinearLayout.VERTICAL
            fitsSystemWindows = true
            addView(row(state, choose))
            addView(scroll, LinearLayout.LayoutParams(MATCH_PARENT, 0, 1f))
            addView(row(draft, send))
        }
    }

    /** A view that takes the room, and one beside it. */
    private fun row(wide: View, narrow: View) = LinearLayout(this).apply {
        addView(wide, LinearLayout.LayoutParams(0, WRAP_CONTENT, 1f))
        addView(narrow, LinearLayout.LayoutParams(WRAP_CONTENT, WRAP_CONTENT))
    }

    private fun choose() {
        val intent = Intent(Intent.ACTION_OPEN_DOCUMENT).addCategory(Intent.CATEGORY_OPENABLE).setType("*/*")
        startActivityForResult(intent, CHOOSE)
    }

    @Deprecated("The platform's own way, without a library")
    override fun onActivityResult(request: Int, result: Int, data: Intent?) {
        val document = data?.data ?: return
        if (request == CHOOSE && result == RESULT_OK) open(CopiedModel(this, document))
    }

    private fun open(source: ModelSource) {
        reply?.cancel()
        scope.launch {
            try {
                val loaded = kinglet.load(source, ModelOptions(degrade = true)) { done, total ->
                    runOnUiThread { state.text = "Copying, ${done shr 20} of ${total shr 20} MB" }
                }
                session?.close()
                model?.close()
                model = loaded
                session = loaded.session(SessionOptions(nCtx = 4096))
                state.text = loaded.info().name
                log.text = ""
            } catch (e: KingletException) {
                state.text = e.message
            } catch (e: IOException) {
                state.text = e.message
            }
        }
    }

    private fun send() {
        val session = session ?: return
        val text = draft.text.toString().ifBlank { return }
        draft.text.clear()
        show("\n› $text\n\n")
        send.text = "Stop"
        reply = scope.launch {
            try {
                session.send(text).collect { chunk -> if (chunk is Chunk.Text) show(chunk.text) }
            } catch (e: KingletException) {
                show("[${e.message}]")
            } finally {
                show("\n")
                showIdle()
            }
        }
    }

    private fun showIdle() {
        reply = null
        send.text = "Send"
    }

    private fun show(text: String) {
        log.append(text)
        scroll.post { scroll.fullScroll(View.FOCUS_DOWN) }
    }

    private companion object {
        const val CHOOSE = 1
    }
}
