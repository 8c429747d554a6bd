import CKinglet

/// Why a call failed, as `kinglet.h` names and numbers it.
public enum Status: UInt32, Sendable {
    /// A text, a size or a value is out of range.
    case argument = 1
    case handle
    /// The session is at work, by a hand other than its own actor's.
    case busy
    case cancelled
    case timeout
    /// The system refused to read or write a file.
    case io
    /// A file is damaged, or not what it should be.
    case file
    /// A sound file that this library cannot run.
    case unsupported
    /// No chat template, or it refuses the messages.
    case template
    /// The messages do not fit into the context.
    case contextFull
    /// An allocation was refused.
    case memory
    /// The memory budget does not suffice.
    case budget
    case backend
    /// A bug of the library; the process goes on.
    case panic
    /// A bug has ended this session.
    case poisoned
    /// An array of the caller is too small.
    case space
}

/// A call of the library failed. `message` tells what was expected and what was found.
public struct KingletError: Error, Equatable, CustomStringConvertible {
    /// `nil`: one that this version does not know.
    public let status: Status?
    public let message: String
    public var description: String { message }
}

func check(_ status: kinglet_status) throws {
    if status != KINGLET_OK {
        throw KingletError(status: Status(rawValue: status.rawValue), message: String(cString: kinglet_error_last()))
    }
}
