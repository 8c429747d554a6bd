import CKinglet
import Dispatch

/// A handle of the library, released with the last that refers to it. Handles are numbers, and every function takes
/// them on every thread, so that it may be sent.
final class Handle: @unchecked Sendable {
    let pointer: OpaquePointer
    private let release: (OpaquePointer?) -> Void

    /// What `make` puts into its place.
    init(
        release: @escaping (OpaquePointer?) -> Void,
        make: (UnsafeMutablePointer<OpaquePointer?>) -> kinglet_status
    ) throws {
        var made: OpaquePointer?
        try check(make(&made))
        guard let made else { preconditionFailure("what succeeds makes something") }
        pointer = made
        self.release = release
    }

    deinit { release(pointer) }
}

/// A flag that ends work from another thread.
struct Cancel: Sendable {
    let handle: Handle

    init() throws {
        handle = try Handle(release: kinglet_cancel_release, make: kinglet_cancel_create)
    }

    func set() {
        _ = kinglet_cancel_set(handle.pointer)
    }
}

extension DispatchQueue {
    /// Runs what blocks on this queue, where it keeps none of Swift's own threads waiting. A cancel of the task sets
    /// the flag, and the call returns when the work has ended.
    func blocking<T: Sendable>(_ work: @escaping @Sendable (Cancel) throws -> T) async throws -> T {
        let cancel = try Cancel()
        do {
            return try await withTaskCancellationHandler {
                try await withCheckedThrowingContinuation { continuation in
                    self.async { continuation.resume(with: Result { try work(cancel) }) }
                }
            } onCancel: {
                cancel.set()
            }
        } catch let error as KingletError where error.status == .cancelled {
            throw CancellationError()
        }
    }
}

/// The UTF-8 of a text during a call.
func withText<T>(_ text: String, _ body: (UnsafePointer<CChar>?, Int) throws -> T) rethrows -> T {
    var text = text
    return try text.withUTF8 { utf8 in
        try utf8.withMemoryRebound(to: CChar.self) { try body($0.baseAddress, $0.count) }
    }
}

/// The UTF-8 of a text during a call; of none, nothing.
func withText<T>(_ text: String?, _ body: (UnsafePointer<CChar>?, Int) throws -> T) rethrows -> T {
    guard let text else { return try body(nil, 0) }
    return try withText(text, body)
}

/// A text that the library gives.
func text(_ bytes: UnsafePointer<CChar>?, _ count: Int) -> String {
    UnsafeBufferPointer(start: bytes, count: count).withMemoryRebound(to: UInt8.self) {
        String(decoding: $0, as: UTF8.self)
    }
}

/// The text of the buffer that `make` puts into its place.
func bufferText(_ make: (UnsafeMutablePointer<OpaquePointer?>) -> kinglet_status) throws -> String {
    let buffer = try Handle(release: kinglet_buffer_release, make: make)
    var data: UnsafePointer<CChar>?
    var count = 0
    return try withExtendedLifetime(buffer) {
        try check(kinglet_buffer_data(buffer.pointer, &data, &count))
        return text(data, count)
    }
}
