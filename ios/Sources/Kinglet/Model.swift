import CKinglet

/// What a model is.
public struct ModelInfo: Sendable, Equatable {
    public let name: String
    public let nParams, weightBytes, nCtxTrain, nVocab, hidden, nLayers: UInt64
    /// Whether ``Session/send(_:options:)`` works.
    public let hasChatTemplate: Bool
    public let threads: UInt32
}

/// A file, mapped; for any number of sessions. Made by ``Runtime/load(_:options:)``.
public final class Model: Sendable {
    let handle: Handle

    init(handle: Handle) {
        self.handle = handle
    }

    /// What it is.
    public func info() throws -> ModelInfo {
        var i = kinglet_model_info()
        i.struct_size = MemoryLayout<kinglet_model_info>.size
        try check(kinglet_model_describe(handle.pointer, &i))
        return ModelInfo(
            name: try bufferText { kinglet_model_name(handle.pointer, $0) }, nParams: i.n_params,
            weightBytes: i.weight_bytes, nCtxTrain: i.n_ctx_train, nVocab: i.n_vocab, hidden: i.hidden,
            nLayers: i.n_layers, hasChatTemplate: i.has_chat_template != 0, threads: i.threads
        )
    }

    /// An empty conversation.
    public func session(_ options: SessionOptions = SessionOptions()) async throws -> Session {
        try await Runtime.queue.blocking { [handle] _ in
            var params = options.native
            return Session(
                handle: try Handle(release: kinglet_session_release) {
                    kinglet_session_create($0, handle.pointer, &params)
                }
            )
        }
    }

    /// Gives up to `bytes` of experts back to the system, whatever runs; how many it gave.
    public func trim(_ bytes: UInt64 = .max) throws -> UInt64 {
        var freed: UInt64 = 0
        try check(kinglet_model_trim(handle.pointer, bytes, &freed))
        return freed
    }

    /// Changes the ``ModelOptions/memory`` that the model was loaded with, whatever runs: sessions keep what they have,
    /// weights or experts get what that leaves. No bit of a reply depends on it. ``Status/budget``: it does not suffice,
    /// and nothing has changed; ``Status/argument``: the model was loaded without one.
    public func setMemory(_ bytes: UInt64) async throws {
        try await Runtime.queue.blocking { [handle] _ in
            try check(kinglet_model_set_memory(handle.pointer, bytes))
        }
    }

    /// The tokens of `text`. With `ends` those too that begin and end a text, where the model wants them; with `control`
    /// control tokens that are spelled out become such, which is not for what users or tools say.
    public func tokenize(_ text: String, ends: Bool = false, control: Bool = false) throws -> [UInt32] {
        let flags = (ends ? KINGLET_TOKENIZE_ENDS.rawValue : 0) | (control ? KINGLET_TOKENIZE_CONTROL.rawValue : 0)
        return try withText(text) { bytes, count in
            try [UInt32](unsafeUninitializedCapacity: count + 2) { tokens, n in // there are no more
                try check(
                    kinglet_model_tokenize(handle.pointer, bytes, count, flags, tokens.baseAddress, tokens.count, &n))
            }
        }
    }

    /// The text of `tokens`. Control tokens have none, and bytes that are no UTF-8 become U+FFFD.
    public func detokenize(_ tokens: [UInt32]) throws -> String {
        try bufferText { kinglet_model_detokenize(handle.pointer, $0, tokens, tokens.count) }
    }
}
