import Kinglet
import SwiftUI
import UniformTypeIdentifiers

/// One conversation with one model.
@MainActor
final class Chat: ObservableObject {
    struct Line: Identifiable {
        let id = UUID()
        let isReply: Bool
        var text: String
    }

    @Published private(set) var lines: [Line] = []
    @Published private(set) var state = "Choose a model file"
    @Published private(set) var reply: Task<Void, Never>?
    @Published private var session: Session?
    private var runtime: Runtime?

    var canSend: Bool { session != nil && reply == nil }

    func open(_ file: URL) {
        state = "Loading…"
        Task {
            do {
                // Stays open: pages of the file are read as long as the model is in use.
                _ = file.startAccessingSecurityScopedResource()
                let runtime = try runtime ?? Runtime()
                self.runtime = runtime
                await runtime.followSystem()
                let model = try await runtime.load(file, options: ModelOptions(degrade: true))
                session = try await model.session(SessionOptions(nCtx: 4096))
                (state, lines) = (try model.info().name, [])
            } catch {
                state = "\(error)"
            }
        }
    }

    func send(_ text: String) {
        guard let session, reply == nil else { return }
        lines += [Line(isReply: false, text: text), Line(isReply: true, text: "")]
        reply = Task {
            do {
                for try await chunk in await session.send(text) {
                    if case .text(let piece) = chunk { lines[lines.count - 1].text += piece }
                }
            } catch {
                lines[lines.count - 1].text += "\n\(error)"
            }
            reply = nil
        }
    }

    func stop() {
        reply?.cancel()
    }
}

/// A screen to chat: `WindowGroup { ChatView() }`.
struct ChatView: View {
    @StateObject private var chat = Chat()
    @State private var draft = ""
    @State private var isChoosing = false

    var body: some View {
        NavigationView {
            VStack {
                ScrollViewReader { scroll in
                    ScrollView {
                        LazyVStack(alignment: .leading, spacing: 12) {
                            ForEach(chat.lines) { line in
                                Text(line.text)
                                    .padding(10)
                                    .background(line.isReply ? Color.gray.opacity(0.15) : Color.blue.opacity(0.2))
                                    .cornerRadius(12)
                                    .textSelection(.enabled)
                                    .id(line.id)
                            }
                        }
                        .padding()
                    }
                    .onChange(of: chat.lines.last?.text) { _ in scroll.scrollTo(chat.lines.last?.id, anchor: .bottom) }
                }
                HStack {
                    TextField("Message", text: $draft).textFieldStyle(.roundedBorder).onSubmit(send)
                    if chat.reply != nil {
                        Button("Stop", action: chat.stop)
                    } else {
                        Button("Send", action: send).disabled(!chat.canSend || draft.isEmpty)
                    }
                }
                .padding()
            }
            .navigationTitle(chat.state)
            .toolbar { Button("Model") { isChoosing = true } }
            .fileImporter(isPresented: $isChoosing, allowedContentTypes: [.data]) { chosen in
                if case .success(let file) = chosen { chat.open(file) }
            }
        }
    }

    private func send() {
        guard chat.canSend, !draft.isEmpty else { return }
        chat.send(draft)
        draft = ""
    }
}
