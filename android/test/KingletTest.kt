/**
 * The Kotlin API on a desktop JVM over the real library: KingletTest MODEL FOLDER [SESSIONS]. Fails with the first
 * check that does.
 */

import dev.kinglet.Chunk
import dev.kinglet.Event
import dev.kinglet.Finish
import dev.kinglet.Kinglet
import dev.kinglet.KingletException
import dev.kinglet.Model
import dev.kinglet.ModelOptions
import dev.kinglet.ModelSource
import dev.kinglet.Pooling
import dev.kinglet.Reply
import dev.kinglet.ReplyFormat
import dev.kinglet.ReplyOptions
import dev.kinglet.Session
import dev.kinglet.SessionOptions
import dev.kinglet.Status
import java.io.File
import java.lang.management.ManagementFactory
import java.nio.file.Files
import java.util.concurrent.atomic.AtomicInteger
import javax.management.ObjectName
import kotlin.math.abs
import kotlin.math.sqrt
import kotlin.time.Duration
import kotlin.time.Duration.Companion.milliseconds
import kotlin.time.Duration.Companion.seconds
import kotlin.time.TimeSource
import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.CompletableDeferred
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.async
import kotlinx.coroutines.cancelAndJoin
import kotlinx.coroutines.coroutineScope
import kotlinx.coroutines.delay
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.first
import kotlinx.coroutines.flow.filterIsInstance
import kotlinx.coroutines.flow.take
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.launch
import kotlinx.coroutines.runBlocking

const val QUESTION = "Describe a small café in Zürich. 🦊"
const val NEXT = "And then?"
val few = ReplyOptions(maxTokens = 24, ignoreEnd = true)
val endless = ReplyOptions(maxTokens = 1500, ignoreEnd = true)

class Failed(what: String) : AssertionError(what)

/** Checks that throw are counted too, for the last line. */
val checks = AtomicInteger()

fun expect(good: Boolean, what: () -> Any?) {
    checks.incrementAndGet()
    if (!good) throw Failed(what().toString())
}

fun <T> expectSame(expected: T, found: T) = expect(expected == found) { "expected $expected\n   found $found" }

inline fun expectStatus(status: Status, call: () -> Unit): KingletException {
    try {
        call()
    } catch (e: KingletException) {
        expectSame(status, e.status)
        return e
    }
    throw Failed("expected $status, found no exception")
}

suspend fun Model.open(): Session = session(SessionOptions(nCtx = 2048)).apply { set("temp", "0") } // runs compare

/** A whole reply, and what it was. */
suspend fun Flow<Chunk>.all(): Pair<String, Reply> {
    val chunks = toList()
    val texts = chunks.filterIsInstance<Chunk.Text>()
    expect(texts.size > 4 && texts.none { it.text.isEmpty() }) { "expected pieces, found $chunks" }
    val reply = (chunks.last() as Chunk.End).reply
    expect((chunks.first() is Chunk.Prefill) == (reply.reusedTokens < reply.promptTokens)) { chunks }
    return texts.joinToString("") { it.text } to reply
}

suspend fun history(model: Model, folder: File) {
    val session = model.open()
    val (fresh, reply) = session.send(QUESTION, few).all()
    expectSame(24L to Finish.LENGTH, reply.replyTokens to reply.finish)
    expect(reply.firstToken > Duration.ZERO && reply.decode > Duration.ZERO) { reply }
    val fork = session.fork()
    val (second, more) = session.send(NEXT, few).all()
    expect(more.reusedTokens > 0 && more.reusedTokens < more.promptTokens) { more }
    expectSame(second, fork.send(NEXT, few).all().first)
    fork.close()

    session.rewind(2)
    expectSame(2L, session.info().nMessages)
    expectSame(second, session.send(NEXT, few).all().first)
    expectSame(second, session.regenerate(few).all().first)

    session.rewind(2)
    val state = File(folder, "gespräch-🦊.state")
    session.save(state)
    val restored = model.open()
    restored.restore(state)
    expectSame(session.messages(), restored.messages())
    val (after, what) = restored.send(NEXT, few).all()
    expectSame(second, after)
    expect(what.reusedTokens > 0) { what }
    restored.close()
    expect(state.delete()) { state }

    session.rewind(0)
    expectSame(fresh, session.sendBlocking(QUESTION, few) { true }.let { lastReply(session) })
    val stop = fresh.drop(fresh.length / 2).take(3)
    val (before, ended) = session.regenerate(few.copy(stops = listOf("🦊 never", stop))).all()
    expectSame(Finish.STOP, ended.finish)
    expectSame(fresh.substringBefore(stop), before)
    session.close()
}

/** The content of the last message. The texts of these tests need no more of JSON. */
fun lastReply(session: Session): String = session.messages()
    .substringAfterLast("\"content\":\"").removeSuffix("\"}]")
    .replace("\\n", "\n").replace("\\\"", "\"").replace("\\\\", "\\")

suspend fun texts(kinglet: Kinglet, model: Model, file: File, folder: File) {
    // Two, three and four bytes, a character outside of the first plane, a zero, marks that join.
    val text = "Zürich, 日本, 🦊👩‍👩‍👧, \u0000 𝄞 \u200d é"
    val json = "[{\"role\":\"system\",\"content\":\"${text.replace("\u0000", "\\u0000")}\"}]"
    val session = model.open()
    session.setMessages(json)
    expectSame(json, session.messages())
    session.setSystem("🦊")
    expect("\"🦊\"" in session.messages()) { session.messages() }
    session.rewind(0)
    session.send(text, few).toList()
    expect("日本, 🦊👩‍👩‍👧" in session.messages()) { session.messages() }
    val why = expectStatus(Status.ARGUMENT) { session.set("temp-𝄞", "0") }
    expect("𝄞" in why.message!!) { why }

    // What a model says, too: one that has seen enough foxes goes on. So long that JNI would warn of what each chunk
    // leaves behind.
    session.set("repeat-penalty", "1")
    val (foxes, _) = session.complete("🦊".repeat(60), few.copy(maxTokens = 200)).all()
    expect(foxes.startsWith("🦊🦊")) { foxes }
    val link = Files.createSymbolicLink(File(folder, "módel-🦊.gguf").toPath(), file.toPath()).toFile()
    kinglet.load(link).use { expectSame(model.info(), it.info()) }
    expect(link.delete()) { link }
    session.close()
}

/** Ended replies leave the session free, at once. */
suspend fun cancels(model: Model) {
    val session = model.open()
    val some = session.send(QUESTION, endless).filterIsInstance<Chunk.Text>().take(3).toList()
    expectSame(3, some.size)
    expectSame(2L, session.info().nMessages) // idle, and what came is part of it
    expect(lastReply(session).startsWith(some.joinToString("") { it.text })) { session.messages() }

    // In the middle of a long prompt, too.
    session.rewind(0)
    val prompt = "a fox and a small bird ".repeat(250)
    val waits = (0 until 12).map { i ->
        coroutineScope {
            val job = launch { session.send(prompt, endless).toList() }
            delay((5 + 23 * i).milliseconds)
            val since = TimeSource.Monotonic.markNow()
            job.cancelAndJoin()
            val took = since.elapsedNow()
            session.rewind(0)
            took
        }
    }
    println("  cancelled within ${waits.max()}, half of them ${waits.sorted()[6]}")
    expect(waits.max() < 2.seconds) { waits } // the C tests measure; this is for a machine that does other things

    // One that is cancelled before it begins.
    coroutineScope { launch { session.send(prompt, endless).toList() }.cancelAndJoin() }
    expectSame(0L, session.info().nMessages)
    val (text, _) = session.send(QUESTION, few).all()
    val other = model.open()
    expectSame(other.send(QUESTION, few).all().first, text)
    session.close()
    other.close()
}

suspend fun loads(kinglet: Kinglet, file: File) {
    // One that nobody waits for any more leaves no model behind.
    val before = handles()
    for (i in 0 until 6) {
        coroutineScope {
            val job = launch(Dispatchers.Default) { kinglet.load(file).close() } // it may be done before
            delay((4 * i).milliseconds)
            job.cancelAndJoin()
        }
    }
    expectSame(before, handles())
    var told = 0L to 0L
    val source = ModelSource { progress ->
        progress(1, 2)
        file
    }
    kinglet.load(source) { done, total -> told = done to total }.close()
    expectSame(1L to 2L, told)
    val plan = Kinglet.plan(file, session = SessionOptions(nCtx = 512))
    expect(plan.nCtx == 512L && plan.total > plan.kv && plan.kv > 0) { plan }
    val missing = expectStatus(Status.IO) { kinglet.load(File("/nowhere/🦊.gguf")) }
    expect("🦊" in missing.message!!) { missing }
    Event.entries.forEach(kinglet::notify)
    kinglet.notify(Event.THERMAL_NOMINAL)
}

/** Replies that must be something, calls of tools, and what they answered. */
suspend fun formats(model: Model) {
    val session = model.open()
    val schema = ReplyFormat.JsonSchema(
        """{"type":"object","properties":{"sound":{"enum":["mäh","🦊"]}},"required":["sound"],"additionalProperties":false}""",
    )
    val (json, reply) = session.send(QUESTION, ReplyOptions(maxTokens = 64, format = schema)).all()
    expectSame(Finish.STOP, reply.finish)
    expect(Regex("""\{\s*"sound"\s*:\s*"(mäh|🦊)"\s*}""").matches(json)) { json }
    val wrong = expectStatus(Status.ARGUMENT) {
        session.send("x", ReplyOptions(format = ReplyFormat.JsonSchema("""{"type":"strin"}"""))).toList()
    }
    expect("JSON schema at `/`" in wrong.message!!) { wrong }

    session.rewind(0)
    session.setTools("""[{"type":"function","function":{"name":"sky"}}]""")
    val called = ReplyFormat.Grammar(
        """start: "Hm.<tool_call>{\"name\":\"sky\",\"arguments\":{\"at\":\"Zürich 🦊\"}}</tool_call>"""" ,
    )
    val chunks = session.send("How is the sky?", ReplyOptions(maxTokens = 200, format = called)).toList()
    expectSame("Hm.", chunks.filterIsInstance<Chunk.Text>().joinToString("") { it.text })
    expectSame(
        listOf(Chunk.Call("""{"name":"sky","arguments":{"at":"Zürich 🦊"}}""")), chunks.filterIsInstance<Chunk.Call>(),
    )
    // As the model wrote it, since this model's template knows no calls.
    expectSame("Hm.<tool_call>{\"name\":\"sky\",\"arguments\":{\"at\":\"Zürich 🦊\"}}</tool_call>", lastReply(session))
    val answer = """[{"role":"tool","content":"blue 🦊","tool_call_id":"call_0"}]"""
    expectSame(24L, session.answer(answer, few).all().second.replyTokens)
    expect("blue 🦊" in session.messages()) { session.messages() }
    expectSame(4L, session.info().nMessages)
    expectStatus(Status.ARGUMENT) { session.answer("[]", few).toList() }
    expectStatus(Status.ARGUMENT) { session.setTools("{}") }
    session.setTools("")
    session.close()
}

fun length(vector: FloatArray) = sqrt(vector.fold(0.0) { sum, x -> sum + x * x })

/** Texts as tokens and as vectors. */
suspend fun vectors(model: Model) {
    val text = "Naïve 🦊, <|im_end|>"
    val tokens = model.tokenize(text)
    expectSame(text, model.detokenize(tokens))
    expect(model.tokenize(text, control = true).size < tokens.size) { "a control token is one" }
    expectSame(0, model.tokenize("").size)
    expectSame("", model.detokenize(IntArray(0)))
    expectStatus(Status.ARGUMENT) { model.detokenize(intArrayOf(-1)) }

    val session = model.session(SessionOptions(nCtx = 2048))
    val hidden = model.info().hidden.toInt()
    val mean = session.embed(QUESTION)
    expect(mean.size == hidden && abs(length(mean) - 1) < 1e-3) { "${mean.size}, ${length(mean)}" }
    val states = session.hiddenStates(QUESTION)
    expectSame(model.tokenize(QUESTION, ends = true).size, states.size)
    val raw = session.embed(QUESTION, normalize = false)
    val means = FloatArray(hidden) { i -> states.sumOf { it[i].toDouble() }.toFloat() / states.size }
    expect(raw.indices.all { abs(raw[it] - means[it]) < 1e-4 * length(raw) }) { "the mean of its states" }
    val last = session.embed(QUESTION, Pooling.LAST)
    expect(last.indices.all { abs(last[it] - states.last()[it] / length(states.last())) < 1e-4 }) { "the last state" }
    coroutineScope {
        val job = async { session.embed("a fox and a small bird ".repeat(250)) }
        delay(10.milliseconds)
        val since = TimeSource.Monotonic.markNow()
        job.cancelAndJoin()
        expect(since.elapsedNow() < 2.seconds) { since.elapsedNow() }
    }
    expectSame(mean.toList(), session.embed(QUESTION).toList())
    expectStatus(Status.CONTEXT_FULL) { session.embed("a fox and a small bird ".repeat(500)) }
    session.close()
}

/** The descriptor of this process for a file that is open, which Java keeps to itself. */
fun descriptor(file: File): Int =
    File("/proc/self/fd").listFiles()!!.first { it.canonicalPath == file.canonicalPath }.name.toInt()

/** Models in the middle of an open file, and with a budget that changes. */
suspend fun sources(kinglet: Kinglet, model: Model, file: File, folder: File) {
    val packed = File(folder, "packed 🦊").apply { writeBytes(ByteArray(1000) + file.readBytes() + ByteArray(1000)) }
    val stream = packed.inputStream()
    val fd = descriptor(packed)
    val plan = Kinglet.planFd(fd, 1000, file.length(), session = SessionOptions(nCtx = 512))
    expectSame(Kinglet.plan(file, session = SessionOptions(nCtx = 512)).let { it.kv to it.nCtx }, plan.kv to plan.nCtx)
    expectStatus(Status.ARGUMENT) { kinglet.loadFd(fd, 1002, file.length()) }
    expectStatus(Status.FILE) { kinglet.loadFd(fd) }
    expectStatus(Status.ARGUMENT) { kinglet.loadFd(-1) }
    kinglet.loadFd(fd, 1000, file.length()).use { other ->
        stream.close()
        expect(packed.delete()) { packed }
        expectSame(model.info().nParams, other.info().nParams)
        val expected = model.open().use { it.send(QUESTION, few).all().first }
        expectSame(expected, other.open().use { it.send(QUESTION, few).all().first })
    }

    val none = expectStatus(Status.ARGUMENT) { model.setMemory(1L shl 30) }
    expect("without a budget" in none.message!!) { none }
    kinglet.load(file, ModelOptions(memory = 4L shl 30)).use { other ->
        // Within a budget matrices are not copied, and sums run in another order.
        val expected = other.open().use { it.send(QUESTION, few).all().first }
        val session = other.open()
        val text = StringBuilder()
        session.send(QUESTION, few).collect { // whatever runs
            if (it is Chunk.Text) text.append(it.text)
            other.setMemory((4L shl 30) + text.length)
        }
        expectStatus(Status.BUDGET) { other.setMemory(1) }
        expectSame(expected, text.toString())
        session.close()
    }
}

suspend fun profiles(file: File) {
    val profile = Kinglet.profile(file, nPrompt = 16, nGen = 4)
    val json = profile.json()
    expect(json.startsWith("{") && "decode" in json && "prefill" in json) { json.take(200) }
    expect(profile.trace().length > 1000) { profile.trace() }
    profile.close()
    expectStatus(Status.HANDLE) { profile.json() }
    coroutineScope {
        val job = async(Dispatchers.Default) { Kinglet.profile(file, nPrompt = 60_000) }
        delay(30.milliseconds)
        val since = TimeSource.Monotonic.markNow()
        job.cancelAndJoin()
        expect(since.elapsedNow() < 5.seconds) { since.elapsedNow() }
    }
}

/** What a callback or a collector throws reaches the caller, and the session goes on. */
suspend fun throwing(model: Model) {
    class OnPurpose(val at: Int) : RuntimeException("on purpose 🦊")
    val session = model.open()
    var n = 0
    val thrown = OnPurpose(3)
    try {
        session.sendBlocking(QUESTION, endless) { if (++n == 3) throw thrown else true }
        throw Failed("expected an exception")
    } catch (e: OnPurpose) {
        expect(e === thrown && n == 3) { "expected the same and no more calls, found $e after $n" }
    }
    try {
        session.send(QUESTION, endless).collect { if (it is Chunk.Text) throw thrown }
        throw Failed("expected an exception")
    } catch (e: OnPurpose) {
        expectSame(3, e.at)
    }
    val reply = session.sendBlocking(NEXT, few) { it !is Chunk.Text }
    expectSame(Finish.CANCELLED, reply.finish)
    session.close()
}

suspend fun busy(model: Model) {
    val session = model.open()
    session.sendBlocking(QUESTION, few) {
        expectStatus(Status.BUSY) { session.rewind(0) }
        true
    }
    coroutineScope {
        val begun = CompletableDeferred<Unit>()
        val first = async(Dispatchers.Default) { session.send(NEXT, endless).collect { begun.complete(Unit) } }
        begun.await()
        expectStatus(Status.BUSY) { session.send("x").first() }
        expectStatus(Status.BUSY) { session.fork() }
        first.cancelAndJoin()
    }
    session.info()
    session.close()
    session.close()
    expectStatus(Status.HANDLE) { session.info() }
    expectStatus(Status.HANDLE) { session.send("x").first() }
    expectStatus(Status.HANDLE) { model.session().use { it.close(); it.rewind(0) } }
}

/** Sessions of one model on several threads say what one alone says. */
suspend fun together(model: Model) = coroutineScope {
    val alone = model.open().use { it.send(QUESTION, few).all().first }
    val all = (1..4).map { async(Dispatchers.Default) { model.open().use { it.send(QUESTION, few).all().first } } }
    all.forEach { expectSame(alone, it.await()) }
}

/** More places than these tests ever take in the library's table of handles. */
var lastPlace = 255L

/**
 * Handles that are alive. The lower half of one is its place in the table, where new ones take the free places first: when
 * one comes to a place where none has been all before it are taken, by the new ones and those that are alive.
 */
fun handles(): Long {
    val more = mutableListOf<Kinglet>()
    do more += Kinglet() while (more.last().handle and 0xffffffffL <= lastPlace)
    lastPlace = more.last().handle and 0xffffffffL
    more.forEach(Kinglet::close)
    return lastPlace + 1 - more.size
}

fun residentKiB(): Long {
    System.gc()
    return File("/proc/self/status").readLines().first { it.startsWith("VmRSS") }.filter(Char::isDigit).toLong()
}

/** Global references of JNI, as the JVM counts them. */
fun globalReferences(): Int {
    val threads = ManagementFactory.getPlatformMBeanServer().invoke(
        ObjectName("com.sun.management:type=DiagnosticCommand"), "threadPrint",
        arrayOf(arrayOf<String>()), arrayOf("[Ljava.lang.String;"),
    ) as String
    return Regex("JNI global refs: (\\d+)").find(threads)!!.groupValues[1].toInt()
}

/** [n] sessions that come and go; their replies end in four ways. */
suspend fun leaks(model: Model, n: Int, handlesBefore: Long) {
    suspend fun one(i: Int) {
        val session = model.session(SessionOptions(nCtx = 512))
        val words = ReplyOptions(maxTokens = 4, ignoreEnd = true, stops = listOf("🦊"))
        when (i % 4) {
            0 -> session.send("Hello $i", words).toList()
            1 -> session.send("Hello $i", words).first()
            2 -> try {
                session.sendBlocking("Hello $i", words) { throw CancellationException("on purpose") }
            } catch (_: CancellationException) {
                session.fork().close()
            }
            else -> expectStatus(Status.ARGUMENT) { session.set("no such name", "🦊") }
        }
        session.close()
    }
    val first = residentKiB()
    val held = List(8) { model.session(SessionOptions(nCtx = 512)).apply { sendBlocking("Hello", few) { true } } }
    val size = (residentKiB() - first) / held.size
    expectSame(handlesBefore + held.size, handles())
    held.forEach(Session::close)
    // What is allocated once, and what the JVM compiles.
    repeat(n / 4 + 50) { one(it) }
    val (bytes, references) = residentKiB() to globalReferences()
    repeat(n) { one(it) }
    val grown = residentKiB() - bytes
    println("  $n sessions of $size KiB: $grown KiB more, ${handles() - handlesBefore} handles more")
    expectSame(handlesBefore, handles())
    // One in four that stayed would be seen, and 4 KiB of each; the heap of the JVM comes and goes, and it has references of its own.
    val more = globalReferences() - references
    expect(more < n / 8) { "$more references more after $n sessions" }
    expect(grown < 16 * 1024 + n * 4) { "$grown KiB more after $n sessions" }
}

fun main(args: Array<String>) = runBlocking {
    val (file, folder) = File(args[0]).absoluteFile to File(args[1]).apply { mkdirs() }
    val n = args.getOrElse(2) { "100" }.toInt()
    val kinglet = Kinglet()
    val model = kinglet.load(file)
    val handlesBefore = handles()
    expectSame(2, handlesBefore)
    println("Kinglet ${Kinglet.version} on Java ${System.getProperty("java.version")}: ${model.info()}")
    suspend fun test(name: String, body: suspend () -> Unit) {
        val since = TimeSource.Monotonic.markNow()
        body()
        println("ok $name (${since.elapsedNow().inWholeMilliseconds} ms)")
    }
    test("history") { history(model, folder) }
    test("texts") { texts(kinglet, model, file, folder) }
    test("cancels") { cancels(model) }
    test("formats") { formats(model) }
    test("vectors") { vectors(model) }
    test("sources") { sources(kinglet, model, file, folder) }
    test("profiles") { profiles(file) }
    expectSame(handlesBefore, handles())
    test("throwing") { throwing(model) }
    test("busy") { busy(model) }
    test("together") { together(model) }
    test("loads") { loads(kinglet, file) }
    test("leaks") { leaks(model, n, handlesBefore) }
    model.close()
    kinglet.close()
    println("all ${checks.get()} checks hold")
}
