import CKinglet
import Dispatch
import Foundation

/// What a reply must be. Tokens are allowed one by one, so that a reply which ends by itself is one of the texts, and one
/// that is cut short the beginning of one. One that is wrong fails with ``Status/argument``, and says where; a library that
/// was built without the feature `grammar` fails with ``Status/unsupported``.
public enum ReplyFormat: Sendable, Equatable {
    /// JSON that a schema (draft 2020-12, `$ref` within it) describes.
    case jsonSchema(String)
    /// A text of a grammar, in llguidance's variant of Lark.
    case grammar(String)
}

/// What a reply may be, and when it ends.
public struct ReplyOptions: Sendable {
    /// Tokens of the reply; 0: until it ends or the context is full.
    public var maxTokens: UInt64
    /// Texts that end the reply and are not part of it; at most 64.
    public var stops: [String]
    /// The model may not end.
    public var ignoreEnd: Bool
    /// What the reply must be; anything by default.
    public var format: ReplyFormat?

    public init(maxTokens: UInt64 = 0, stops: [String] = [], ignoreEnd: Bool = false, format: ReplyFormat? = nil) {
        self.maxTokens = maxTokens
        self.stops = stops
        self.ignoreEnd = ignoreEnd
        self.format = format
    }
}

/// Why a reply ended.
public enum Finish: UInt32, Sendable {
    /// The model ended, or a stop text came.
    case stop = 1
    /// ``ReplyOptions/maxTokens``.
    case length
    case cancelled
    case contextFull
}

/// What a reply was.
public struct Reply: Sendable {
    public let finish: Finish
    /// Tokens of the whole conversation.
    public let promptTokens: UInt64
    /// Those that the session held; the others were read.
    public let reusedTokens: UInt64
    public let replyTokens: UInt64
    /// Seconds to read the prompt, from the call to the first token, and of the tokens after it.
    public let prefill, firstToken, decode: TimeInterval
}

/// A piece of a reply.
public enum Chunk: Sendable {
    /// So many tokens of the prompt are read.
    case prefill(done: UInt64, total: UInt64)
    /// Whole characters, in order.
    case text(String)
    /// A call of a tool, `{"name":"...","arguments":{...}}`, when it is whole; see ``Session/setTools(_:)``. Arguments are
    /// the model's words: check them.
    case call(String)
    /// The last one.
    case end(Reply)
}

/// How the hidden states of tokens become one vector.
public enum Pooling: UInt32, Sendable {
    /// Their mean.
    case mean = 1
    /// That of the last token, which alone has seen all.
    case last
}

/// What a session holds.
public struct SessionInfo: Sendable {
    public let nCtx, nTokens, nMessages: UInt64
    public let kvBytes, convBytes, scratchBytes: UInt64
}

/// One conversation. It does one thing after the other: a call waits until those before it have ended. Made by
/// ``Model/session(_:)``.
public actor Session {
    private nonisolated let handle: Handle
    private nonisolated let queue = DispatchQueue(label: "kinglet.session")

    init(handle: Handle) {
        self.handle = handle
    }

    /// Replies to `text`, from now on. A cancel of the task that reads ends the reply, and so does to let go of the
    /// stream; what came is part of the conversation.
    public func send(_ text: String, options: ReplyOptions = ReplyOptions()) -> AsyncThrowingStream<Chunk, Error> {
        stream(.send(text), options)
    }

    /// Replaces the last reply by another one.
    public func regenerate(options: ReplyOptions = ReplyOptions()) -> AsyncThrowingStream<Chunk, Error> {
        stream(.regenerate, options)
    }

    /// Appends `messages`, JSON as ``messages()`` gives it, and replies to them: what tools have answered,
    /// `[{"role":"tool","tool_call_id":"call_0","content":"..."}, ...]`.
    public func answer(
        _ messages: String, options: ReplyOptions = ReplyOptions()
    ) -> AsyncThrowingStream<Chunk, Error> {
        stream(.answer(messages), options)
    }

    /// Continues `text` as it is, without template and messages.
    public func complete(_ text: String, options: ReplyOptions = ReplyOptions()) -> AsyncThrowingStream<Chunk, Error> {
        stream(.complete(text), options)
    }

    /// Replies to `text` and returns when the reply is complete. `onChunk` is told what comes, on a thread of the
    /// library's work; what it throws ends the reply and is thrown from here. A cancel of the task ends the reply
    /// too.
    public func send(
        _ text: String, options: ReplyOptions = ReplyOptions(), onChunk: @escaping @Sendable (Chunk) throws -> Void
    ) async throws -> Reply {
        try await queue.blocking { [handle] in
            try handle.reply(.send(text), options, cancel: $0, onChunk)
        }
    }

    private func stream(_ prompt: Prompt, _ options: ReplyOptions) -> AsyncThrowingStream<Chunk, Error> {
        AsyncThrowingStream { continuation in
            do {
                let cancel = try Cancel()
                continuation.onTermination = { _ in cancel.set() }
                queue.async { [handle] in
                    do {
                        let reply = try handle.reply(prompt, options, cancel: cancel) { continuation.yield($0) }
                        continuation.yield(.end(reply))
                        continuation.finish()
                    } catch {
                        continuation.finish(throwing: error)
                    }
                }
            } catch {
                continuation.finish(throwing: error)
            }
        }
    }

    /// What it holds.
    public func info() async throws -> SessionInfo {
        try await with { session in
            var i = kinglet_session_info()
            i.struct_size = MemoryLayout<kinglet_session_info>.size
            try check(kinglet_session_describe(session, &i))
            return SessionInfo(
                nCtx: i.n_ctx, nTokens: i.n_tokens, nMessages: i.n_messages, kvBytes: i.kv, convBytes: i.conv,
                scratchBytes: i.scratch
            )
        }
    }

    /// Sets a value of the sampler by its name, as `kinglet_session_set` lists them: `set("temp", "0.7")`.
    public func set(_ name: String, _ value: String) async throws {
        try await with { session in
            try withText(name) { name, nameLen in
                try withText(value) { try check(kinglet_session_set(session, name, nameLen, $0, $1)) }
            }
        }
    }

    /// Sets the system message; the empty text takes it away.
    public func setSystem(_ text: String) async throws {
        try await with { session in try withText(text) { try check(kinglet_session_set_system(session, $0, $1)) } }
    }

    /// The conversation as JSON: `[{"role":"user","content":"..."}, ...]`.
    public func messages() async throws -> String {
        try await with { session in try bufferText { kinglet_session_messages(session, $0) } }
    }

    /// Replaces the conversation. The next reply reads what is different, from the first token that is.
    public func setMessages(_ json: String) async throws {
        try await with { session in try withText(json) { try check(kinglet_session_set_messages(session, $0, $1)) } }
    }

    /// The tools that the model may call, as JSON in the form of templates:
    /// `[{"type":"function","function":{"name":"...","description":"...","parameters":{...a schema...}}}, ...]`; the empty
    /// text: none. From then on calls are no text of the reply but a ``Chunk/call(_:)`` each. Nothing is called: that is the
    /// app's, which then says with ``answer(_:options:)`` what came of it.
    public func setTools(_ json: String) async throws {
        try await with { session in try withText(json) { try check(kinglet_session_set_tools(session, $0, $1)) } }
    }

    /// Goes back: keeps the first `nMessages`. Costs nothing; what is kept is not read again.
    public func rewind(to nMessages: UInt64) async throws {
        try await with { session in try check(kinglet_session_rewind(session, nMessages)) }
    }

    /// Another session that holds the same and goes its own way.
    public func fork() async throws -> Session {
        try await with { session in
            Session(handle: try Handle(release: kinglet_session_release) { kinglet_session_fork($0, session) })
        }
    }

    /// `text` as one vector of ``ModelInfo/hidden`` numbers, of length 1 if `normalize` says so. The session holds the text
    /// then: its messages stay, but the next reply reads them again, so take a session of its own.
    public func embed(_ text: String, pooling: Pooling = .mean, normalize: Bool = true) async throws -> [Float] {
        try await queue.blocking { [handle] in
            try handle.embed(text, kinglet_pooling(pooling.rawValue), normalize, cancel: $0).all
        }
    }

    /// The same with a vector for each token: those of ``Model/tokenize(_:ends:control:)`` with `ends`.
    public func hiddenStates(_ text: String, normalize: Bool = false) async throws -> [[Float]] {
        try await queue.blocking { [handle] in
            let (all, hidden) = try handle.embed(text, KINGLET_POOLING_NONE, normalize, cancel: $0)
            return stride(from: 0, to: all.count, by: hidden).map { Array(all[$0..<$0 + hidden]) }
        }
    }

    /// Writes the conversation and all that the model remembers of it; a file there is replaced when the new one is
    /// complete.
    public func save(to file: URL) async throws {
        try await with { session in try withText(file.path) { try check(kinglet_session_save(session, $0, $1)) } }
    }

    /// Goes on from such a file. The session stays as it was if it fails.
    public func restore(from file: URL) async throws {
        try await with { session in try withText(file.path) { try check(kinglet_session_load(session, $0, $1)) } }
    }

    private func with<T: Sendable>(_ work: @escaping @Sendable (OpaquePointer) throws -> T) async throws -> T {
        try await queue.blocking { [handle] _ in
            try withExtendedLifetime(handle) { try work(handle.pointer) }
        }
    }
}

/// What replies are made to.
enum Prompt: Sendable {
    case send(String), regenerate, answer(String), complete(String)
}

/// Who is told about a reply, and what it threw.
private final class Listener {
    let onChunk: (Chunk) throws -> Void
    var thrown: Error?

    init(_ onChunk: @escaping (Chunk) throws -> Void) {
        self.onChunk = onChunk
    }

    func tell(_ chunk: kinglet_chunk) -> CInt {
        do {
            if chunk.kind == KINGLET_CHUNK_PREFILL.rawValue {
                try onChunk(.prefill(done: chunk.done, total: chunk.total))
            } else if chunk.kind == KINGLET_CHUNK_TEXT.rawValue, chunk.text_len > 0 { // empty where no character ends
                try onChunk(.text(text(chunk.text, chunk.text_len)))
            } else if chunk.kind == KINGLET_CHUNK_CALL.rawValue {
                try onChunk(.call(text(chunk.text, chunk.text_len)))
            }
            return 0
        } catch {
            thrown = error
            return 1
        }
    }
}

extension Handle {
    /// Vectors of a text, one after the other, and the size of one; on this thread.
    fileprivate func embed(
        _ text: String, _ pooling: kinglet_pooling, _ normalize: Bool, cancel: Cancel
    ) throws -> (all: [Float], hidden: Int) {
        var params = kinglet_embed_params()
        params.struct_size = MemoryLayout<kinglet_embed_params>.size
        params.raw = normalize ? 0 : 1
        params.cancel = cancel.handle.pointer
        return try withExtendedLifetime((self, cancel)) {
            try withText(text) { bytes, count in
                // Without room it says how many there are, and does nothing.
                let size = { (pooling: kinglet_pooling) throws -> Int in
                    var n = 0
                    params.pooling = pooling.rawValue
                    let status = kinglet_session_embed(self.pointer, bytes, count, &params, nil, 0, &n)
                    if status != KINGLET_E_SPACE { try check(status) }
                    return n
                }
                let hidden = try size(KINGLET_POOLING_LAST)
                let n = try size(pooling)
                let all = try [Float](unsafeUninitializedCapacity: n) { floats, n in
                    try check(kinglet_session_embed(pointer, bytes, count, &params, floats.baseAddress, floats.count, &n))
                }
                return (all, hidden)
            }
        }
    }

    /// A reply on this thread.
    fileprivate func reply(
        _ prompt: Prompt, _ options: ReplyOptions, cancel: Cancel, _ onChunk: @escaping (Chunk) throws -> Void
    ) throws -> Reply {
        let listener = Listener(onChunk)
        let user = Unmanaged.passUnretained(listener).toOpaque()
        let told: kinglet_on_chunk = { chunk, user in
            guard let chunk, let user else { return 1 }
            return Unmanaged<Listener>.fromOpaque(user).takeUnretainedValue().tell(chunk.pointee)
        }
        var r = kinglet_reply()
        r.struct_size = MemoryLayout<kinglet_reply>.size
        var params = kinglet_generate_params()
        params.struct_size = MemoryLayout<kinglet_generate_params>.size
        params.max_tokens = options.maxTokens
        params.ignore_end = options.ignoreEnd ? 1 : 0
        params.cancel = cancel.handle.pointer
        var (schema, grammar): (String?, String?)
        switch options.format {
        case .jsonSchema(""), .grammar(""): // would be none
            throw KingletError(status: .argument, message: "format: expected a schema or grammar, found an empty text")
        case .jsonSchema(let text): schema = text
        case .grammar(let text): grammar = text
        case nil: break
        }
        let status = withExtendedLifetime((self, cancel, listener)) {
            withTexts(options.stops) { stops in
                withText(schema) { schema, schemaCount in
                    withText(grammar) { grammar, grammarCount in
                        params.stops = stops.baseAddress
                        params.n_stops = stops.count
                        params.json_schema = schema
                        params.json_schema_len = schemaCount
                        params.grammar = grammar
                        params.grammar_len = grammarCount
                        switch prompt {
                        case .send(let text):
                            return withText(text) { kinglet_session_send(pointer, $0, $1, &params, &r, told, user) }
                        case .regenerate:
                            return kinglet_session_regenerate(pointer, &params, &r, told, user)
                        case .answer(let json):
                            return withText(json) { kinglet_session_answer(pointer, $0, $1, &params, &r, told, user) }
                        case .complete(let text):
                            return withText(text) { kinglet_session_complete(pointer, $0, $1, &params, &r, told, user) }
                        }
                    }
                }
            }
        }
        if let thrown = listener.thrown { throw thrown }
        try check(status)
        let seconds = { (ns: UInt64) in TimeInterval(ns) * 1e-9 }
        return Reply(
            finish: Finish(rawValue: r.finish) ?? .stop, promptTokens: r.prompt_tokens, reusedTokens: r.reused_tokens,
            replyTokens: r.reply_tokens, prefill: seconds(r.prefill_ns), firstToken: seconds(r.first_token_ns),
            decode: seconds(r.decode_ns)
        )
    }
}

/// Some texts during a call.
private func withTexts<T>(_ texts: [String], _ body: (UnsafeBufferPointer<kinglet_text>) throws -> T) rethrows -> T {
    let bytes = texts.flatMap(\.utf8).map(CChar.init(bitPattern:))
    return try bytes.withUnsafeBufferPointer { bytes in
        var at = 0
        let parts = texts.map { text in
            defer { at += text.utf8.count }
            return kinglet_text(text: bytes.baseAddress.map { $0 + at }, text_len: text.utf8.count)
        }
        return try parts.withUnsafeBufferPointer(body)
    }
}
