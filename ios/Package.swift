// swift-tools-version:6.0
import PackageDescription

// The library itself: on a Mac what xcframework.sh has built, on Linux one that the linker finds (-Xlinker -L…).
#if os(Linux)
let native: Target = .systemLibrary(name: "CKinglet", path: "Sources/CKinglet")
#else
let native: Target = .binaryTarget(name: "CKinglet", path: "Kinglet.xcframework")
#endif

let package = Package(
    name: "Kinglet",
    platforms: [.iOS(.v15), .macOS(.v12)],
    products: [.library(name: "Kinglet", targets: ["Kinglet"])],
    targets: [
        native,
        .target(
            name: "Kinglet",
            dependencies: ["CKinglet"],
            resources: [.copy("PrivacyInfo.xcprivacy")],
            linkerSettings: [.linkedLibrary("kinglet", .when(platforms: [.linux]))]
        ),
        // A program that checks the API against a model: swift run check MODEL FOLDER
        .executableTarget(name: "check", dependencies: ["Kinglet"], path: "Check"),
    ]
)
