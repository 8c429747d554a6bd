// The Swift API over the real library: check MODEL FOLDER [SESSIONS]. Ends with the first check that fails.

import Foundation
import Kinglet

struct Failed: Error, CustomStringConvertible {
    let description: String
}

struct OnPurpose: Error, Equatable {
    let at: Int
}

func expect(_ good: Bool, _ what: @autoclosure () -> Any, line: Int = #line) throws {
    if !good { throw Failed(description: "line \(line): \(what())") }
}

func expectSame<T: Equatable>(_ expected: T, _ found: T, line: Int = #line) throws {
    try expect(expected == found, "expected \(expected)\n   found \(found)", line: line)
}

func expectStatus(_ status: Status, line: Int = #line, _ call: () async throws -> Void) async throws -> String {
    do {
        try await call()
    } catch let error as KingletError {
        try expectSame(status, error.status, line: line)
        return error.message
    }
    throw Failed(description: "line \(line): expected \(status), found no error")
}

let question = "Describe a small café in Zürich. 🦊"
let next = "And then?"
let few = ReplyOptions(maxTokens: 24, ignoreEnd: true)
let endless = ReplyOptions(maxTokens: 1500, ignoreEnd: true)

func open(_ model: Model) async throws -> Session {
    let session = try await model.session(SessionOptions(nCtx: 2048))
    try await session.set("temp", "0") // runs compare
    return session
}

/// A whole reply, and what it was.
func all(_ stream: AsyncThrowingStream<Chunk, Error>, line: Int = #line) async throws -> (String, Reply) {
    var (text, pieces) = ("", 0)
    var reply: Reply?
    for try await chunk in stream {
        try expect(reply == nil, "nothing after the end", line: line)
        switch chunk {
        case .prefill: try expectSame(0, pieces, line: line)
        case .text(let piece): (text, pieces) = (text + piece, pieces + 1)
        case .call(let json): throw Failed(description: "line \(line): expected no call, found \(json)")
        case .end(let it): reply = it
        }
    }
    guard let reply else { throw Failed(description: "line \(line): expected an end, found none") }
    try expect(pieces > 4, "expected pieces, found \(pieces)", line: line)
    return (text, reply)
}

/// The content of the last message.
func lastReply(_ session: Session) async throws -> String {
    struct Message: Decodable { let role, content: String }
    let messages = try JSONDecoder().decode([Message].self, from: Data(try await session.messages().utf8))
    return messages.last?.content ?? ""
}

func history(_ model: Model, _ folder: URL) async throws {
    let session = try await open(model)
    let (fresh, reply) = try await all(session.send(question, options: few))
    try expect(reply.replyTokens == 24 && reply.finish == .length && reply.decode > 0, reply)
    let fork = try await session.fork()
    let (second, more) = try await all(session.send(next, options: few))
    try expect(more.reusedTokens > 0 && more.reusedTokens < more.promptTokens, more)
    try expectSame(second, try await all(fork.send(next, options: few)).0)

    try await session.rewind(to: 2)
    try expectSame(2, try await session.info().nMessages)
    try expectSame(second, try await all(session.send(next, options: few)).0)
    try expectSame(second, try await all(session.regenerate(options: few)).0)

    try await session.rewind(to: 2)
    let state = folder.appendingPathComponent("gespräch-🦊.state")
    try await session.save(to: state)
    let restored = try await open(model)
    try await restored.restore(from: state)
    try expectSame(try await session.messages(), try await restored.messages())
    let (after, what) = try await all(restored.send(next, options: few))
    try expectSame(second, after)
    try expect(what.reusedTokens > 0, what)
    try FileManager.default.removeItem(at: state)

    try await session.rewind(to: 0)
    _ = try await session.send(question, options: few) { _ in }
    try expectSame(fresh, try await lastReply(session))
    let stop = String(fresh.dropFirst(fresh.count / 2).prefix(3))
    let (before, ended) = try await all(
        session.regenerate(options: ReplyOptions(maxTokens: 24, stops: ["🦊 never", stop], ignoreEnd: true)))
    try expectSame(Finish.stop, ended.finish)
    try expectSame(String(fresh[..<fresh.range(of: stop)!.lowerBound]), before)
}

func texts(_ runtime: Runtime, _ model: Model, _ file: URL, _ folder: URL) async throws {
    // Two, three and four bytes, a character outside of the first plane, marks that join.
    let text = "Zürich, 日本, 🦊👩‍👩‍👧, 𝄞 \u{200d} e\u{301}"
    let json = "[{\"role\":\"system\",\"content\":\"\(text)\"}]"
    let session = try await open(model)
    try await session.setMessages(json)
    try expectSame(Array(json.utf8), Array(try await session.messages().utf8))
    try await session.rewind(to: 0)
    // What a model says, too: one that has seen enough foxes goes on.
    try await session.set("repeat-penalty", "1")
    let (foxes, _) = try await all(session.complete(String(repeating: "🦊", count: 60), options: few))
    try expect(foxes.hasPrefix("🦊🦊"), foxes)
    let why = try await expectStatus(.argument) { try await session.set("temp-𝄞", "0") }
    try expect(why.contains("𝄞"), why)
    let link = folder.appendingPathComponent("módel-🦊.gguf")
    try FileManager.default.createSymbolicLink(at: link, withDestinationURL: file)
    try expectSame(try model.info(), try await runtime.load(link).info())
    try FileManager.default.removeItem(at: link)
}

func cancels(_ model: Model) async throws {
    // By who stops to read: what came is part of the conversation.
    let session = try await open(model)
    var some = ""
    for try await chunk in await session.send(question, options: endless) {
        if case .text(let piece) = chunk { some += piece }
        if some.count > 20 { break }
    }
    try expectSame(2, try await session.info().nMessages)
    try expect(try await lastReply(session).hasPrefix(some), some)

    // By a cancel of the task, in the middle of a long prompt.
    try await session.rewind(to: 0)
    let prompt = String(repeating: "a fox and a small bird ", count: 250)
    var waits: [TimeInterval] = []
    for i in 0..<12 {
        let task = Task { try await all(session.send(prompt, options: endless)) }
        try await Task.sleep(nanoseconds: UInt64(5 + 23 * i) * 1_000_000)
        let since = Date()
        task.cancel()
        _ = await task.result
        try await session.rewind(to: 0) // after the reply has ended
        waits.append(Date().timeIntervalSince(since))
    }
    waits.sort()
    print(String(format: "  cancelled within %.1f ms, half of them %.1f ms", waits[11] * 1e3, waits[6] * 1e3))
    try expect(waits[11] < 2, waits)

    let task = Task { try await session.send(prompt, options: endless) { _ in } }
    try await Task.sleep(nanoseconds: 20_000_000)
    task.cancel()
    try expectSame(Finish.cancelled, try await task.value.finish)
    try await session.rewind(to: 0)
    let other = try await open(model)
    let fresh = try await all(other.send(question, options: few)).0
    try expectSame(fresh, try await all(session.send(question, options: few)).0)
}

/// Replies that must be something, calls of tools, and what they answered.
func formats(_ model: Model) async throws {
    let session = try await open(model)
    let schema = """
        {"type":"object","properties":{"sound":{"enum":["mäh","🦊"]}},"required":["sound"],"additionalProperties":false}
        """
    struct Sound: Decodable { let sound: String }
    let (json, reply) = try await all(
        session.send(question, options: ReplyOptions(maxTokens: 64, format: .jsonSchema(schema))))
    try expectSame(Finish.stop, reply.finish)
    let sound = try JSONDecoder().decode(Sound.self, from: Data(json.utf8)).sound
    try expect(["mäh", "🦊"].contains(sound), sound)
    let why = try await expectStatus(.argument) {
        let wrong = ReplyOptions(format: .jsonSchema(#"{"type":"strin"}"#))
        for try await _ in await session.send("x", options: wrong) {}
    }
    try expect(why.contains("JSON schema at `/`"), why)
    _ = try await expectStatus(.argument) {
        for try await _ in await session.send("x", options: ReplyOptions(format: .grammar(""))) {}
    }

    try await session.rewind(to: 0)
    try await session.setTools(#"[{"type":"function","function":{"name":"sky"}}]"#)
    let called = #"start: "Hm.<tool_call>{\"name\":\"sky\",\"arguments\":{\"at\":\"Zürich 🦊\"}}</tool_call>""#
    var (text, calls) = ("", [String]())
    let options = ReplyOptions(maxTokens: 200, format: .grammar(called))
    for try await chunk in await session.send("How is the sky?", options: options) {
        if case .text(let piece) = chunk { text += piece }
        if case .call(let json) = chunk { calls.append(json) }
    }
    try expectSame("Hm.", text)
    try expectSame([#"{"name":"sky","arguments":{"at":"Zürich 🦊"}}"#], calls)
    let answer = #"[{"role":"tool","content":"blue 🦊","tool_call_id":"call_0"}]"#
    try expectSame(24, try await all(session.answer(answer, options: few)).1.replyTokens)
    let messages = try await session.messages()
    try expect(messages.contains("<tool_call>") && messages.contains("blue 🦊"), messages)
    _ = try await expectStatus(.argument) { try await session.setTools("{}") }
}

func length(_ vector: [Float]) -> Float {
    vector.reduce(0) { $0 + $1 * $1 }.squareRoot()
}

/// Texts as tokens and as vectors.
func vectors(_ model: Model) async throws {
    let text = "Naïve 🦊, <|im_end|>"
    let tokens = try model.tokenize(text)
    try expectSame(text, try model.detokenize(tokens))
    try expect(try model.tokenize(text, control: true).count < tokens.count, "a control token is one")
    try expectSame([], try model.tokenize(""))
    try expectSame("", try model.detokenize([]))
    _ = try await expectStatus(.argument) { _ = try model.detokenize([.max]) }

    let session = try await model.session(SessionOptions(nCtx: 2048))
    let hidden = Int(try model.info().hidden)
    let mean = try await session.embed(question)
    try expect(mean.count == hidden && abs(length(mean) - 1) < 1e-3, mean.count)
    let states = try await session.hiddenStates(question)
    try expectSame(try model.tokenize(question, ends: true).count, states.count)
    let raw = try await session.embed(question, normalize: false)
    let scale = length(raw)
    for i in 0..<hidden {
        let sum = states.reduce(0) { $0 + Double($1[i]) }
        try expect(abs(raw[i] - Float(sum / Double(states.count))) < 1e-4 * scale, i)
    }
    let last = try await session.embed(question, pooling: .last)
    let end = states[states.count - 1]
    try expect(zip(last, end).allSatisfy { abs($0 - $1 / length(end)) < 1e-4 }, "the last state")
    let task = Task { try await session.embed(String(repeating: "a fox and a small bird ", count: 250)) }
    try await Task.sleep(nanoseconds: 10_000_000)
    task.cancel()
    do {
        _ = try await task.value
    } catch {
        try expect(error is CancellationError, error)
    }
    try expectSame(mean, try await session.embed(question))
}

/// Models in the middle of an open file, with a budget that changes, and where their time goes.
func sources(_ runtime: Runtime, _ model: Model, _ file: URL, _ folder: URL) async throws {
    let packed = folder.appendingPathComponent("packed 🦊")
    let bytes = try Data(contentsOf: file)
    try (Data(count: 1000) + bytes + Data(count: 1000)).write(to: packed)
    let handle = try FileHandle(forReadingFrom: packed)
    let size = UInt64(bytes.count)
    let plan = try await Runtime.plan(handle, offset: 1000, length: size, session: SessionOptions(nCtx: 512))
    try expectSame(try await Runtime.plan(file, session: SessionOptions(nCtx: 512)).kv, plan.kv)
    _ = try await expectStatus(.argument) { _ = try await runtime.load(handle, offset: 1002, length: size) }
    _ = try await expectStatus(.file) { _ = try await runtime.load(handle) }
    let other = try await runtime.load(handle, offset: 1000, length: size)
    try handle.close()
    try FileManager.default.removeItem(at: packed)
    let expected = try await all(open(model).send(question, options: few)).0
    try expectSame(expected, try await all(open(other).send(question, options: few)).0)

    _ = try await expectStatus(.argument) { try await model.setMemory(1 << 30) }
    let bounded = try await runtime.load(file, options: ModelOptions(memory: 4 << 30))
    let session = try await open(bounded)
    var said = ""
    for try await chunk in await session.send(question, options: few) {
        guard case .text(let piece) = chunk else { continue }
        said += piece
        try await bounded.setMemory((4 << 30) + UInt64(said.utf8.count)) // whatever runs
    }
    try expectSame(expected, said)
    _ = try await expectStatus(.budget) { try await bounded.setMemory(1) }

    let profile = try await Runtime.profile(file, nPrompt: 16, nGen: 4)
    let json = try profile.json()
    try expect(json.hasPrefix("{") && json.contains("prefill"), json)
    try expect(try profile.trace().utf8.count > 1000, "a trace")
}

func throwing(_ model: Model) async throws {
    let session = try await open(model)
    do {
        _ = try await session.send(question, options: endless) { if case .text = $0 { throw OnPurpose(at: 3) } }
        throw Failed(description: "expected an error")
    } catch let error as OnPurpose {
        try expectSame(OnPurpose(at: 3), error)
    }
    _ = try await all(session.send(next, options: few))
    let wrong = await session.send(question, options: ReplyOptions(stops: Array(repeating: "x", count: 65)))
    _ = try await expectStatus(.argument) { for try await _ in wrong {} }
    _ = try await expectStatus(.argument) { try await session.rewind(to: 100) }
}

/// Sessions of one model on several threads say what one alone says.
func together(_ model: Model) async throws {
    let alone = try await all(open(model).send(question, options: few)).0
    try await withThrowingTaskGroup(of: String.self) { group in
        for _ in 0..<4 {
            group.addTask { try await all(open(model).send(question, options: few)).0 }
        }
        for try await text in group { try expectSame(alone, text) }
    }
}

func loads(_ runtime: Runtime, _ file: URL) async throws {
    for i in 0..<6 {
        let task = Task { try await runtime.load(file) }
        try await Task.sleep(nanoseconds: UInt64(4 * i) * 1_000_000)
        task.cancel()
        do {
            _ = try await task.value
        } catch {
            try expect(error is CancellationError, error)
        }
    }
    let plan = try await Runtime.plan(file, session: SessionOptions(nCtx: 512))
    try expect(plan.nCtx == 512 && plan.total > plan.kv && plan.kv > 0, plan)
    let missing = URL(fileURLWithPath: "/nowhere/🦊.gguf")
    let why = try await expectStatus(.io) { _ = try await runtime.load(missing) }
    try expect(why.contains("🦊"), why)
    try Event.allCases.forEach(runtime.notify)
    try runtime.notify(.thermalNominal)
}

func residentKiB() throws -> Int {
    let status = try String(contentsOfFile: "/proc/self/status", encoding: .utf8)
    let line = status.split(separator: "\n").first { $0.hasPrefix("VmRSS") }
    return Int(line?.filter(\.isNumber) ?? "") ?? 0
}

/// `n` sessions that come and go; their replies end in four ways.
func leaks(_ model: Model, _ n: Int) async throws {
    @Sendable func one(_ i: Int) async throws {
        let session = try await model.session(SessionOptions(nCtx: 512))
        let words = ReplyOptions(maxTokens: 4, stops: ["🦊"], ignoreEnd: true)
        switch i % 4 {
        case 0: for try await _ in await session.send("Hello \(i)", options: words) {}
        case 1: for try await _ in await session.send("Hello \(i)", options: words) { break }
        case 2:
            do {
                _ = try await session.send("Hello \(i)", options: words) { _ in throw OnPurpose(at: i) }
            } catch is OnPurpose {
                _ = try await session.fork()
            }
        default: _ = try await expectStatus(.argument) { try await session.set("no such name", "🦊") }
        }
    }
    for i in 0..<(n / 4 + 100) { try await one(i) } // what is allocated once
    let before = try residentKiB()
    for i in 0..<n { try await one(i) }
    let grown = try residentKiB() - before
    print("  \(n) sessions: \(grown) KiB more")
    // A session of this size holds some 7 MB: few that stayed would be seen.
    try expect(grown < 32 * 1024 + n * 4, "\(grown) KiB more after \(n) sessions")
}

let arguments = CommandLine.arguments
guard arguments.count > 2 else {
    print("usage: check MODEL FOLDER [SESSIONS]")
    exit(2)
}
let file = URL(fileURLWithPath: arguments[1])
let folder = URL(fileURLWithPath: arguments[2], isDirectory: true)
try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)

func test(_ name: String, _ body: () async throws -> Void) async throws {
    let since = Date()
    try await body()
    print(String(format: "ok \(name) (%.0f ms)", Date().timeIntervalSince(since) * 1e3))
}

do {
    let runtime = try Runtime()
    let model = try await runtime.load(file)
    print("Kinglet \(Runtime.version): \(try model.info())")
    try await test("history") { try await history(model, folder) }
    try await test("texts") { try await texts(runtime, model, file, folder) }
    try await test("cancels") { try await cancels(model) }
    try await test("formats") { try await formats(model) }
    try await test("vectors") { try await vectors(model) }
    try await test("sources") { try await sources(runtime, model, file, folder) }
    try await test("throwing") { try await throwing(model) }
    try await test("together") { try await together(model) }
    try await test("loads") { try await loads(runtime, file) }
    try await test("leaks") { try await leaks(model, arguments.count > 3 ? Int(arguments[3]) ?? 100 : 100) }
} catch {
    print("failed: \(error)")
    exit(1)
}
