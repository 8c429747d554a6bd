#if canImport(UIKit)
import CKinglet
import Foundation
import UIKit

/// What is registered with the system, until this goes.
final class Observers: @unchecked Sendable {
    private let tokens: [NSObjectProtocol]

    init(_ tell: @escaping @Sendable (Event) -> Void) {
        let center = NotificationCenter.default
        let on = { (name: Notification.Name, event: @escaping @Sendable () -> Event) in
            center.addObserver(forName: name, object: nil, queue: nil) { _ in tell(event()) }
        }
        tokens = [
            on(UIApplication.didReceiveMemoryWarningNotification) { .lowMemory },
            on(UIApplication.didEnterBackgroundNotification) { .background },
            on(UIApplication.willEnterForegroundNotification) { .foreground },
            on(ProcessInfo.thermalStateDidChangeNotification) { .thermal },
        ]
        tell(.thermal) // it may be hot already
    }

    deinit {
        tokens.forEach(NotificationCenter.default.removeObserver)
    }
}

extension Event {
    /// How warm the device is.
    static var thermal: Event {
        switch ProcessInfo.processInfo.thermalState {
        case .critical: .thermalCritical
        case .serious: .thermalSerious
        default: .thermalNominal
        }
    }
}

extension Runtime {
    /// From now on tells the runtime what the system tells the app: memory warnings, background and foreground, heat.
    public func followSystem() {
        // At once, in the thread that tells: an app that goes to the background may not get another.
        observers = Observers { [handle] event in
            _ = kinglet_runtime_notify(handle.pointer, kinglet_event(rawValue: event.rawValue))
        }
    }
}
#endif
