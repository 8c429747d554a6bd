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
}
