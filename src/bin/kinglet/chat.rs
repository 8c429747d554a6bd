//! `kinglet chat`: the conversation in a terminal, or through a pipe, where each line is a turn.

use std::io::{self, BufRead, IsTerminal};
use std::path::{Path, PathBuf};

use kinglet::sampler::{Sampler, Settings, Source};
use kinglet::session::{Chat, Event, Finish, GenerateOptions, Reply, Stats};
use kinglet::{KvTypes, Model};
use rustyline::completion::{Completer, FilenameCompleter, Pair};
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::FileHistory;
use rustyline::validate::Validator;
use rustyline::{Behavior, CompletionType, Config, Context, Editor, Helper};

use crate::args::ChatArgs;
use crate::failure::{Failure, Outcome};
use crate::store::{self, SessionFile};
use crate::ui::{self, Paint, ReplyPrinter};
use crate::{args, interrupt, locate, show};

const HELP: &str = "\
  /help               this
  /bye                leave (also Ctrl-D)
  /clear              forget the conversation, but for the system message
  /regen              another reply to your last message
  /undo               take the last exchange back
  /set NAME VALUE     temp, top-k, top-p, min-p, … (see /show), system, max-tokens, stop, stats,
                       memory (of --memory)
  /show [WHAT]        settings, model, system, template, messages
  /save FILE          write the conversation with all that was computed, or its messages alone if FILE ends in .json
  /load FILE          go on with a saved conversation
  /read FILE          put the text of a file before your next message
  /stats              counts, times and memory
  \"\"\"                 begins and ends a message of several lines
Ctrl-C stops a reply; what was said of it stays.";

const COMMANDS: &[&str] = &[
    "/help", "/bye", "/clear", "/regen", "/undo", "/set", "/show", "/save", "/load", "/read",
    "/stats",
];

/// What begins and ends a message of several lines.
const FENCE: &str = "\"\"\"";

pub fn run(args: &ChatArgs) -> Outcome {
    args.sampling.check()?;
    let model = locate::load_within(&args.model, &args.budget, &args.session)?;
    if model.tokenizer()?.chat_template().is_none() {
        return Err(Failure::usage(format!(
            "{}: the file has no chat template, so it is no chat model; `kinglet run --raw` continues a text with it",
            model.gguf().path().display()
        )));
    }
    let file = args.name.as_deref().map(SessionFile::open).transpose()?;
    let sampler = Sampler::new(&args.sampling.settings(&model)?);
    let chat = Chat::new(args.session.open(&model)?)?;
    let mut input = Input::new();
    if !args.quiet && input.is_terminal() {
        greet(&model, &chat);
    }
    let mut repl = Repl {
        chat,
        sampler,
        file,
        changed: false,
        options: args.end.options(&model)?,
        stats: !args.quiet,
        kv: args.session.options().kv,
        before: String::new(),
        totals: Totals::default(),
        told_fault: false,
        paint: Paint::stderr(),
    };
    repl.resume()?;
    if args.system.is_some() {
        repl.chat.set_system(args.system.as_deref());
    }
    while let Some(line) = input.message()? {
        if !repl.take(&line)? {
            break;
        }
    }
    Ok(())
}

fn greet(model: &Model, chat: &Chat) {
    let info = model.info();
    ui::note(&format!(
        "{}: {}, {} parameters, context {}, {} threads. /help lists the commands.",
        info.name,
        info.config.architecture,
        ui::count(info.n_params),
        chat.session().n_ctx(),
        model.n_threads(),
    ));
}

/// Sums over the replies of a conversation.
#[derive(Default)]
struct Totals {
    replies: usize,
    prompt_tokens: usize,
    reused_tokens: usize,
    replayed_tokens: usize,
    decode_tokens: usize,
    last: Option<Stats>,
}

struct Repl {
    chat: Chat,
    sampler: Sampler,
    /// Where the conversation is kept, and whether it is no longer what is kept there.
    file: Option<SessionFile>,
    changed: bool,
    options: GenerateOptions,
    /// Whether each reply is followed by a line of statistics.
    stats: bool,
    kv: KvTypes,
    /// Text of files that goes before the next message.
    before: String,
    totals: Totals,
    /// Whether it was told that the session has left its GPU.
    told_fault: bool,
    paint: Paint,
}

impl Repl {
    /// Takes a line or a block; `false` ends the conversation. Only a failure of stdout is an error.
    fn take(&mut self, message: &Message) -> Outcome<bool> {
        let done = match message {
            Message::Line(line) if line.trim().is_empty() => Ok(true),
            Message::Line(line) if line.starts_with('/') => self.command(line),
            Message::Line(text) | Message::Block(text) => self.say(text).map(|()| true),
        };
        let done = done.and_then(|go_on| self.keep().map(|()| go_on));
        match done {
            Err(Failure::Stream(error)) => Err(Failure::Stream(error)),
            Err(failure) => {
                if let Some(line) = failure.line() {
                    self.complain(&line);
                }
                Ok(true)
            }
            done => done,
        }
    }

    /// Goes on where the session of that name ended.
    fn resume(&mut self) -> Outcome {
        match &self.file {
            Some(file) if file.path().exists() => {
                let path = file.path().to_owned();
                self.load(&path)
            }
            _ => Ok(()),
        }
    }

    /// Keeps the conversation, if it has a name and has changed.
    fn keep(&mut self) -> Outcome {
        if let Some(file) = &self.file
            && std::mem::take(&mut self.changed)
        {
            self.chat.save_state(file.path(), &self.sampler)?;
        }
        Ok(())
    }

    fn complain(&self, line: &str) {
        let line = ui::printable(line).into_owned();
        ui::note_raw(&self.paint.error(&format!("error: {line}")));
    }

    fn say(&mut self, text: &str) -> Outcome {
        let whole = format!("{}{text}", self.before);
        let Self {
            chat,
            sampler,
            options,
            ..
        } = self;
        let reply = print_reply(|printer| {
            let on = &mut |event: Event| printer.on(event);
            chat.send(&whole, sampler, options, on)
        })?;
        self.before.clear();
        self.after(&reply);
        Ok(())
    }

    fn regenerate(&mut self) -> Outcome {
        let Self {
            chat,
            sampler,
            options,
            ..
        } = self;
        let reply = print_reply(|printer| {
            let on = &mut |event: Event| printer.on(event);
            chat.regenerate(sampler, options, on)
        })?;
        match reply {
            Some(reply) => self.after(&reply),
            None => ui::note("there is no message to reply to"),
        }
        Ok(())
    }

    /// What is to be told after a reply.
    fn after(&mut self, reply: &Reply) {
        let stats = &reply.stats;
        self.changed = true;
        self.totals.replies += 1;
        self.totals.prompt_tokens += stats.prompt_tokens;
        self.totals.reused_tokens += stats.reused_tokens;
        self.totals.replayed_tokens += stats.replayed_tokens;
        self.totals.decode_tokens += stats.decode_tokens;
        self.totals.last = Some(*stats);
        let session = self.chat.session();
        if session.device_fault().is_some() && !self.told_fault {
            self.told_fault = true;
            ui::note_fault(session);
        }
        let end = match reply.finish {
            Finish::Stop => "",
            Finish::Length => " · cut at max-tokens",
            Finish::Cancelled if reply.text.is_empty() => {
                " · stopped before it began, your message is taken back"
            }
            Finish::Cancelled => " · stopped",
            Finish::ContextFull => " · context full: /clear, /undo, or start with a larger -c",
        };
        if self.stats {
            let line = format!("[{}{end}]", ui::stats_line(stats));
            ui::note_raw(&self.paint.dim(&line));
        } else if !end.is_empty() {
            ui::note_raw(
                &self
                    .paint
                    .dim(&format!("[{}]", end.trim_start_matches(" · "))),
            );
        }
    }

    fn command(&mut self, line: &str) -> Outcome<bool> {
        let (name, rest) = line
            .trim()
            .split_once(char::is_whitespace)
            .unwrap_or((line.trim(), ""));
        let rest = rest.trim();
        match name {
            "/help" | "/?" => ui::note(HELP),
            "/bye" | "/exit" | "/quit" => return Ok(false),
            "/clear" => {
                self.chat.clear();
                self.changed = true;
                self.before.clear();
                ui::note("cleared");
            }
            "/regen" => self.regenerate()?,
            "/undo" => match self.chat.undo() {
                Some(text) => {
                    self.changed = true;
                    ui::note(&format!("took back: {}", shortened(&text)));
                }
                None => ui::note("there is nothing to take back"),
            },
            "/set" => self.set(rest)?,
            "/show" => self.show(rest)?,
            "/save" => {
                let path = file(rest)?;
                if path
                    .extension()
                    .is_some_and(|e| e.eq_ignore_ascii_case("json"))
                {
                    self.chat.save(&path)?;
                } else {
                    self.chat.save_state(&path, &self.sampler)?;
                }
                ui::note(&format!(
                    "saved {} messages to {}",
                    self.chat.messages().len(),
                    path.display()
                ));
            }
            "/load" => {
                self.load(&file(rest)?)?;
                self.changed = true;
            }
            "/read" => {
                let path = file(rest)?;
                let text = ui::read_text(&path)?;
                ui::note(&format!(
                    "{}: {} go before your next message",
                    path.display(),
                    ui::bytes(text.len() as u64)
                ));
                self.before.push_str(&text);
                if !self.before.ends_with('\n') {
                    self.before.push('\n');
                }
            }
            "/stats" => self.show_stats(),
            _ => {
                return Err(Failure::usage(format!(
                    "no command `{name}`; /help lists them"
                )));
            }
        }
        Ok(true)
    }

    fn set(&mut self, rest: &str) -> Outcome {
        let Some((name, value)) = rest.split_once(char::is_whitespace) else {
            return Err(Failure::usage(
                "expected /set NAME VALUE; /show lists the names",
            ));
        };
        let value = value.trim();
        match name {
            "system" => {
                self.chat
                    .set_system(Some(unquoted(value)).filter(|text| !text.is_empty()));
                self.changed = true;
            }
            "max-tokens" => {
                let n: i64 = value.parse().map_err(|_| {
                    Failure::usage(format!(
                        "max-tokens: expected a number, or -1, found `{value}`"
                    ))
                })?;
                self.options.max_tokens = usize::try_from(n).ok();
            }
            "stop" => {
                let text = unquoted(value);
                self.options.stop = Some(text.to_owned())
                    .filter(|t| !t.is_empty())
                    .into_iter()
                    .collect();
            }
            "memory" => {
                let bytes = args::size(value).map_err(Failure::usage)?;
                self.chat.model().set_memory(bytes)?;
            }
            "stats" => match value {
                "on" | "off" => self.stats = value == "on",
                _ => {
                    return Err(Failure::usage(format!(
                        "stats: expected on or off, found `{value}`"
                    )));
                }
            },
            _ => {
                let mut settings: Settings = self.sampler.settings().clone();
                settings.set(name, value, Source::Set)?;
                self.sampler.set_settings(&settings);
            }
        }
        ui::note(&format!("{name} = {value}"));
        Ok(())
    }

    fn show(&self, what: &str) -> Outcome {
        let limit = |n: Option<usize>| n.map_or("none".to_owned(), |n| n.to_string());
        match what {
            "" | "settings" => {
                let rows = show::sampling(self.sampler.settings());
                ui::note(rows.trim_end_matches('\n'));
                ui::note(&format!(
                    "  {:<18} {}\n  {:<18} {:?}\n  {:<18} {}",
                    "max-tokens",
                    limit(self.options.max_tokens),
                    "stop",
                    self.options.stop,
                    "generator's seed",
                    self.sampler.seed()
                ));
            }
            "model" => ui::note(show::card(self.chat.session(), self.kv).trim_end()),
            "system" => ui::note(self.chat.system().unwrap_or("no system message")),
            "template" => {
                let tokenizer = self.chat.model().tokenizer()?;
                ui::note(tokenizer.chat_template().unwrap_or("no template"));
            }
            "messages" => {
                if self.chat.messages().is_empty() {
                    ui::note("no messages");
                }
                for message in self.chat.messages() {
                    ui::note(&format!("{}: {}", message.role, message.content));
                }
            }
            _ => {
                return Err(Failure::usage(format!(
                    "/show: expected settings, model, system, template or messages, found `{what}`"
                )));
            }
        }
        Ok(())
    }

    fn load(&mut self, path: &Path) -> Outcome {
        let loaded = self.chat.load(path)?;
        let kept = match loaded.n_tokens {
            0 => String::new(),
            n => format!(", {n} tokens that need not be read again"),
        };
        ui::note(&format!(
            "{} messages from {}{kept}",
            self.chat.messages().len(),
            path.display()
        ));
        if let Some(why) = loaded.reread {
            ui::note(&format!("note: {why}: the next reply reads all messages"));
        }
        let here = &self.chat.model().info().name;
        if let Some(model) = loaded.model.filter(|model| model != here) {
            ui::note(&format!("note: held with {model}, now {here}"));
        }
        let seed = &self.sampler.settings().seed;
        if let Some(generator) = loaded.generator
            && seed.source != Source::Flag
            && seed.source != Source::Set
        {
            self.sampler.set_generator(generator);
        }
        Ok(())
    }

    fn show_stats(&self) {
        let session = self.chat.session();
        let memory = session.memory();
        let totals = &self.totals;
        let copied = match self.chat.model().copied_bytes() {
            0 => String::new(),
            bytes => format!(", {} of copies", ui::bytes(bytes)),
        };
        ui::note(&format!(
            "  messages      {}\n  context       {} of {} tokens\n  replies       {}, {} tokens decoded\n  \
             prompts       {} tokens, {} of them kept from before, {} replayed to go back\n  memory        {} keys and values, {} convolutions, \
             {} scratch, {} weights (mapped{copied})",
            self.chat.messages().len(),
            session.tokens().len(),
            session.n_ctx(),
            totals.replies,
            totals.decode_tokens,
            totals.prompt_tokens,
            totals.reused_tokens,
            totals.replayed_tokens,
            ui::bytes(memory.kv as u64),
            ui::bytes(memory.conv as u64),
            ui::bytes(memory.scratch as u64),
            ui::bytes(self.chat.model().info().weight_bytes),
        ));
        if let Some(stats) = &totals.last {
            ui::note(&format!("  last reply    {}", ui::stats_line(stats)));
        }
    }
}

/// Prints what `make` generates; Ctrl-C ends it.
fn print_reply<T>(make: impl FnOnce(&mut ReplyPrinter) -> kinglet::Result<T>) -> Outcome<T> {
    let busy = interrupt::busy();
    let mut printer = ReplyPrinter::new(true);
    let reply = make(&mut printer);
    drop(busy);
    printer.end()?;
    Ok(reply?)
}

fn file(rest: &str) -> Outcome<PathBuf> {
    let name = unquoted(rest);
    if name.is_empty() {
        return Err(Failure::usage("expected the name of a file"));
    }
    let home = std::env::var_os("HOME");
    match (name.strip_prefix("~/"), home) {
        (Some(below), Some(home)) => Ok(Path::new(&home).join(below)),
        _ => Ok(name.into()),
    }
}

fn unquoted(text: &str) -> &str {
    let inner = text
        .strip_prefix('"')
        .and_then(|text| text.strip_suffix('"'));
    inner.unwrap_or(text)
}

fn shortened(text: &str) -> String {
    let line = ui::one_line(text);
    match line.char_indices().nth(60) {
        Some((at, _)) => format!("{}…", &line[..at]),
        None => line,
    }
}

/// What a person enters.
enum Message {
    /// A line: a command, or something to say.
    Line(String),
    /// What stood between two fences: never a command.
    Block(String),
}

/// Where messages come from.
enum Input {
    Terminal {
        editor: Box<Editor<Assistant, FileHistory>>,
        history: Option<PathBuf>,
    },
    Pipe,
}

impl Input {
    fn new() -> Self {
        if !io::stdin().is_terminal() {
            return Input::Pipe;
        }
        match editor() {
            Ok(editor) => {
                let mut editor = Box::new(editor);
                let history = store::state_folder("").map(|folder| folder.join("history"));
                if let Some(path) = &history {
                    let _ = editor.load_history(path); // none yet, the first time
                }
                Input::Terminal { editor, history }
            }
            // A terminal that cannot be edited on is read line by line.
            Err(_) => Input::Pipe,
        }
    }

    fn is_terminal(&self) -> bool {
        matches!(self, Input::Terminal { .. })
    }

    /// The next line or block; `None` at the end.
    fn message(&mut self) -> Outcome<Option<Message>> {
        loop {
            let line = match self.line("> ")? {
                Entered::Line(line) => line,
                Entered::Interrupted => continue,
                Entered::End => return Ok(None),
            };
            let Some(opened) = line.trim_start().strip_prefix(FENCE) else {
                self.remember(&line);
                return Ok(Some(Message::Line(line)));
            };
            match self.block(opened)? {
                Entered::Line(text) => {
                    self.remember(&format!("{FENCE}{text}{FENCE}"));
                    return Ok(Some(Message::Block(text)));
                }
                Entered::Interrupted => continue,
                Entered::End => return Ok(None),
            }
        }
    }

    /// The rest of a block whose first line goes on with `opened`. At the end of input it counts as closed.
    fn block(&mut self, opened: &str) -> Outcome<Entered> {
        let mut text = String::new();
        let mut line = opened.to_owned();
        loop {
            if let Some(last) = line.trim_end().strip_suffix(FENCE) {
                text.push_str(last);
                return Ok(Entered::Line(text));
            }
            text.push_str(&line);
            // The line of the opening fence alone is no line of the text.
            if !text.is_empty() || line.as_str() != opened {
                text.push('\n');
            }
            line = match self.line("… ")? {
                Entered::Line(line) => line,
                Entered::End if !text.is_empty() => return Ok(Entered::Line(text)),
                ended => return Ok(ended),
            };
        }
    }

    fn line(&mut self, prompt: &str) -> Outcome<Entered> {
        match self {
            Input::Terminal { editor, .. } => {
                let painted = Paint::stderr().prompt(prompt).into_owned();
                match editor.readline(&(prompt, painted.as_str())) {
                    Ok(line) => Ok(Entered::Line(line)),
                    Err(ReadlineError::Interrupted) => Ok(Entered::Interrupted),
                    Err(ReadlineError::Eof) => Ok(Entered::End),
                    Err(ReadlineError::Io(error)) => Err(error.into()),
                    Err(error) => Err(io::Error::other(error).into()),
                }
            }
            Input::Pipe => {
                let mut bytes = Vec::new();
                if io::stdin().lock().read_until(b'\n', &mut bytes)? == 0 {
                    return Ok(Entered::End);
                }
                let line = String::from_utf8_lossy(&bytes);
                let line = line.strip_suffix('\n').unwrap_or(&line);
                Ok(Entered::Line(
                    line.strip_suffix('\r').unwrap_or(line).to_owned(),
                ))
            }
        }
    }

    /// Puts an entry into the history, and into its file at once: another chat may end later.
    fn remember(&mut self, entry: &str) {
        if let Input::Terminal { editor, history } = self
            && let Ok(true) = editor.add_history_entry(entry)
            && let Some(path) = history
        {
            let _ = editor.append_history(path); // a home that cannot be written to
        }
    }
}

/// What came of asking for a line.
enum Entered {
    Line(String),
    Interrupted,
    End,
}

fn editor() -> rustyline::Result<Editor<Assistant, FileHistory>> {
    let config = Config::builder()
        .completion_type(CompletionType::List)
        .history_ignore_space(true)
        .max_history_size(1000)?
        // The terminal itself: the prompt never ends up in a file that takes the replies.
        .behavior(Behavior::PreferTerm)
        .build();
    let mut editor = Editor::with_config(config)?;
    editor.set_helper(Some(Assistant {
        files: FilenameCompleter::new(),
    }));
    Ok(editor)
}

/// Completes commands, names of settings and files.
struct Assistant {
    files: FilenameCompleter,
}

impl Completer for Assistant {
    type Candidate = Pair;

    fn complete(
        &self,
        line: &str,
        at: usize,
        context: &Context,
    ) -> rustyline::Result<(usize, Vec<Pair>)> {
        let typed = &line[..at];
        let from = |words: &[&str], start: &str| -> Vec<Pair> {
            let words = words.iter().filter(|word| word.starts_with(start));
            let pair = |word: &&str| Pair {
                display: word.to_string(),
                replacement: format!("{word} "),
            };
            words.map(pair).collect()
        };
        let Some((command, rest)) = typed.split_once(' ') else {
            let commands = if typed.starts_with('/') {
                from(COMMANDS, typed)
            } else {
                Vec::new()
            };
            return Ok((0, commands));
        };
        let start = at - rest.len();
        match command {
            "/set" if !rest.contains(' ') => Ok((start, from(Settings::NAMES, rest))),
            "/show" => Ok((
                start,
                from(
                    &["settings", "model", "system", "template", "messages"],
                    rest,
                ),
            )),
            "/save" | "/load" | "/read" => self.files.complete(line, at, context),
            _ => Ok((at, Vec::new())),
        }
    }
}

impl Highlighter for Assistant {}
impl Hinter for Assistant {
    type Hint = String;
}
impl Validator for Assistant {}
impl Helper for Assistant {}
