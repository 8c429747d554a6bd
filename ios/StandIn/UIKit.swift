// What Observers.swift uses of UIKit, and of Apple's Foundation, for a compiler that has neither: linux.sh checks
// types by it.

@_exported import Foundation

public enum UIApplication {
    public static let didReceiveMemoryWarningNotification = Notification.Name("memory")
    public static let didEnterBackgroundNotification = Notification.Name("background")
    public static let willEnterForegroundNotification = Notification.Name("foreground")
}

extension ProcessInfo {
    public enum ThermalState: Int, Sendable { case nominal, fair, serious, critical }
    public static let thermalStateDidChangeNotification = Notification.Name("thermal")
    public var thermalState: ThermalState { .nominal }
}
