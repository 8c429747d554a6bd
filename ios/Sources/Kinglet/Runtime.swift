import CKinglet
import Dispatch
import Foundation

/// What the system told the app.
public enum Event: UInt32, Sendable, CaseIterable {
    /// Experts leave memory, down to the least that models can work with.
    case lowMemory = 1
    /// The same, and pages of weights leave memory until they are used again.
    case background
    /// Weights are read ahead again.
    case foreground
    /// Full speed.
    case thermalNominal
    /// After each step replies rest for as long as it took.
    case thermalSerious
    /// And for three times as long.
    case thermalCritical
}

/// How a model is loaded.
public struct ModelOptions: Sendable {
    /// Bytes that this process may have in memory, all together; 0: no limit.
    public var memory: UInt64
    /// Where they do not suffice give up speed and context; else loading fails with ``Status/budget``.
    public var degrade: Bool
    /// Threads of the token loop; 0: as many as pay.
    public var threads: UInt32
    /// Threads that read prompts; 0: as `threads`.
    public var threadsBatch: UInt32

    public init(memory: UInt64 = 0, degrade: Bool = false, threads: UInt32 = 0, threadsBatch: UInt32 = 0) {
        self.memory = memory
        self.degrade = degrade
        self.threads = threads
        self.threadsBatch = threadsBatch
    }

    func native(cancel: OpaquePointer? = nil) -> kinglet_model_params {
        var params = kinglet_model_params()
        params.struct_size = MemoryLayout<kinglet_model_params>.size
        params.memory = memory
        params.degrade = degrade ? 1 : 0
        params.threads = threads
        params.threads_batch = threadsBatch
        params.cancel = cancel
        return params
    }
}

/// In how many bits keys or values are cached.
public enum KVType: UInt32, Sendable {
    case standard, f32, f16, q8_0, q4_0
}

/// How a session is made.
public struct SessionOptions: Sendable {
    /// Tokens that it can hold; 0: what the model was made for, at most 32768.
    public var nCtx: UInt64
    /// Tokens of a prompt that are read at once; 0: 512.
    public var batch: UInt32
    public var keys: KVType
    public var values: KVType

    public init(nCtx: UInt64 = 0, batch: UInt32 = 0, keys: KVType = .standard, values: KVType = .standard) {
        self.nCtx = nCtx
        self.batch = batch
        self.keys = keys
        self.values = values
    }

    var native: kinglet_session_params {
        var params = kinglet_session_params()
        params.struct_size = MemoryLayout<kinglet_session_params>.size
        params.n_ctx = nCtx
        params.batch = batch
        params.keys = keys.rawValue
        params.values = values.rawValue
        return params
    }
}

/// Bytes that a process will have in memory when the context is full, and the session that there will be.
public struct Plan: Sendable {
    public let total, weights, ownWeights, experts, kv, conv, scratch, tokenizer, runtime, program: UInt64
    public let nCtx: UInt64
    public let batch: UInt32
    public let keys, values: KVType
    /// Things given up for the memory.
    public let nConcessions: UInt32
}

/// What the models of a process share; one is enough.
public actor Runtime {
    nonisolated let handle: Handle
    /// For what blocks and belongs to no session.
    static let queue = DispatchQueue(label: "kinglet", attributes: .concurrent)
    #if canImport(UIKit)
    var observers: Observers?
    #endif

    public init() throws {
        handle = try Handle(release: kinglet_runtime_release, make: kinglet_runtime_create)
    }

    /// The version of the library.
    public static var version: String { String(cString: kinglet_version()) }

    /// Tells what the system told the app. Work goes on: cancel what shall not.
    public nonisolated func notify(_ event: Event) throws {
        try check(kinglet_runtime_notify(handle.pointer, kinglet_event(rawValue: event.rawValue)))
    }

    /// Maps the GGUF file; it must not change while the model is in use. Ends soon after the task is cancelled.
    public nonisolated func load(_ file: URL, options: ModelOptions = ModelOptions()) async throws -> Model {
        try await Runtime.queue.blocking { [handle] cancel in
            var params = options.native(cancel: cancel.handle.pointer)
            let model = try withExtendedLifetime(cancel) {
                try Handle(release: kinglet_model_release) { out in
                    withText(file.path) { kinglet_model_load(out, handle.pointer, $0, $1, &params) }
                }
            }
            return Model(handle: model)
        }
    }

    /// The same of a model that is `length` bytes from `offset` on in an open file; 0: up to its end. The library keeps a
    /// descriptor of its own: the caller may close the file when this returns.
    public nonisolated func load(
        _ file: FileHandle, offset: UInt64 = 0, length: UInt64 = 0, options: ModelOptions = ModelOptions()
    ) async throws -> Model {
        let fd = file.fileDescriptor
        return try await Runtime.queue.blocking { [handle] cancel in
            var params = options.native(cancel: cancel.handle.pointer)
            let model = try withExtendedLifetime((cancel, file)) {
                try Handle(release: kinglet_model_release) {
                    kinglet_model_load_fd($0, handle.pointer, fd, offset, length, &params)
                }
            }
            return Model(handle: model)
        }
    }

    /// What a session on the model in `file` will take, from its header alone.
    public static func plan(
        _ file: URL, model: ModelOptions = ModelOptions(), session: SessionOptions = SessionOptions()
    ) async throws -> Plan {
        try await plan(model, session) { p, model, session in
            withText(file.path) { kinglet_plan_make(p, $0, $1, model, session) }
        }
    }

    /// The same of a model in an open file.
    public static func plan(
        _ file: FileHandle, offset: UInt64 = 0, length: UInt64 = 0, model: ModelOptions = ModelOptions(),
        session: SessionOptions = SessionOptions()
    ) async throws -> Plan {
        let fd = file.fileDescriptor
        return try await plan(model, session) { p, model, session in
            withExtendedLifetime(file) { kinglet_plan_make_fd(p, fd, offset, length, model, session) }
        }
    }

    private static func plan(
        _ model: ModelOptions, _ session: SessionOptions,
        _ make: @escaping @Sendable (
            UnsafeMutablePointer<kinglet_plan>, UnsafePointer<kinglet_model_params>,
            UnsafePointer<kinglet_session_params>
        ) -> kinglet_status
    ) async throws -> Plan {
        try await queue.blocking { _ in
            var (model, session, p) = (model.native(), session.native, kinglet_plan())
            p.struct_size = MemoryLayout<kinglet_plan>.size
            try check(make(&p, &model, &session))
            return Plan(
                total: p.total, weights: p.weights, ownWeights: p.own_weights, experts: p.experts, kv: p.kv,
                conv: p.conv, scratch: p.scratch, tokenizer: p.tokenizer, runtime: p.runtime, program: p.program,
                nCtx: p.n_ctx, batch: p.batch, keys: KVType(rawValue: p.keys) ?? .standard,
                values: KVType(rawValue: p.values) ?? .standard, nConcessions: p.n_concessions
            )
        }
    }

    /// Loads the model in `file`, reads a prompt, writes a reply, and notes each operation. Takes as long as that takes, or
    /// until the task is cancelled. The numbers of tokens are at most 65,536; 0: 512 and 64.
    public static func profile(
        _ file: URL, model: ModelOptions = ModelOptions(), nPrompt: UInt32 = 0, nGen: UInt32 = 0
    ) async throws -> Profile {
        try await queue.blocking { cancel in
            var (model, params) = (model.native(cancel: cancel.handle.pointer), kinglet_profile_params())
            params.struct_size = MemoryLayout<kinglet_profile_params>.size
            params.n_prompt = nPrompt
            params.n_gen = nGen
            let handle = try withExtendedLifetime(cancel) {
                try Handle(release: kinglet_profile_release) { out in
                    withText(file.path) { kinglet_profile_make(out, $0, $1, &model, &params) }
                }
            }
            return Profile(handle: handle)
        }
    }
}

/// Where the time of a run went. Made by ``Runtime/profile(_:model:nPrompt:nGen:)``.
public final class Profile: Sendable {
    private let handle: Handle

    init(handle: Handle) {
        self.handle = handle
    }

    /// The report as JSON: phases (load, prefill, decode), in each the time, bytes and kernel of each operation; memory;
    /// the time of a token.
    public func json() throws -> String {
        try bufferText { kinglet_profile_json(handle.pointer, $0) }
    }

    /// Every operation one by one, as Perfetto and `chrome://tracing` read it.
    public func trace() throws -> String {
        try bufferText { kinglet_profile_trace(handle.pointer, $0) }
    }
}
