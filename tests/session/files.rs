//! State files across processes: what one saved, another goes on with; killed at any instant, it leaves the old state
//! or the new one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use kinglet::session::{Extra, StateFile};
use kinglet::{Error, KvType, Session, SessionOptions};

use crate::common::*;

/// Names the file that a child process works on.
const FILE: &str = "KINGLET_SESSION_FILE";

/// A folder of one test.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join("session")
        .join(name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).expect("a folder");
    folder
}

/// This program again, to run the test `name` with a file.
fn child(name: &str, file: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("a program"));
    command
        .args(["--exact", name, "--nocapture"])
        .env(FILE, file);
    command
}

fn options() -> SessionOptions {
    SessionOptions {
        n_ctx: N_CTX,
        ..SessionOptions::default()
    }
}

/// Some tokens read and some decoded.
fn filled(model: &kinglet::Model, seed: u64) -> Session {
    let mut random = Random::new(seed);
    let mut session = session(model, 512);
    let n_vocab = model.info().config.n_vocab;
    let n = 230 + random.below(60);
    let tokens = random.tokens(n, n_vocab);
    prefill(&mut session, &tokens);
    for token in random.tokens(5, n_vocab) {
        session.decode(token).expect("room");
    }
    session
}

/// The logits of a few tokens more, after going back a little.
fn go_on(mut session: Session) -> Vec<u32> {
    let n = session.tokens().len();
    let mut found = bits(session.logits());
    session.decode(11).expect("room");
    found.extend(bits(session.logits()));
    session.truncate(n - 9).expect("no failure");
    prefill(&mut session, &[5, 6, 7]);
    found.extend(bits(session.logits()));
    found
}

#[test]
fn another_process_goes_on_bit_for_bit() {
    if let Some(file) = std::env::var_os(FILE) {
        let file = Path::new(&file);
        let model = load(fs::read_to_string(file.with_extension("model")).expect("a path"));
        let session = Session::load(&model, file, &options()).expect("a session");
        let logits: Vec<String> = go_on(session).iter().map(u32::to_string).collect();
        fs::write(file.with_extension("logits"), logits.join(" ")).expect("a file");
        return;
    }
    let folder = folder("process");
    let smollm2 = smollm2();
    for model in [
        Some(tiny()),
        Some(load("models/lfm2-smol-Q4_0.gguf")),
        smollm2,
    ] {
        let Some(model) = model else { continue };
        let file = folder.join("it.state");
        let path = model
            .gguf()
            .path()
            .to_str()
            .expect("a path in UTF-8")
            .to_owned();
        fs::write(file.with_extension("model"), path).expect("a file");
        let saved = filled(&model, 1);
        saved
            .save(&file, &Extra::default())
            .expect("room on the disk");
        let status = child("files::another_process_goes_on_bit_for_bit", &file).status();
        assert!(status.expect("a process").success());
        let found = fs::read_to_string(file.with_extension("logits")).expect("logits");
        let found: Vec<u32> = found.split(' ').map(|x| x.parse().expect("bits")).collect();
        assert!(found == go_on(filled(&model, 1)), "{}", model.info().name);
        assert!(found == go_on(saved), "saving changes nothing");
    }
}

#[test]
fn a_session_in_the_middle_of_going_back_is_saved_too() {
    let model = tiny();
    let file = folder("cut").join("it.state");
    let mut cut = filled(&model, 2);
    cut.truncate(100).expect("no failure");
    cut.save(&file, &Extra::default()).expect("room");
    let loaded = Session::load(&model, &file, &options()).expect("a session");
    assert_eq!(loaded.tokens(), cut.tokens());
    assert!(loaded.logits().is_empty());
    assert!(go_on(loaded) == go_on(cut));
}

#[test]
fn files_of_others_are_refused() {
    let (model, other) = (tiny(), load("models/lfm2-smol-Q4_0.gguf"));
    let file = folder("others").join("it.state");
    let extra = Extra {
        generator: Some([1, 2]),
        note: b"{}".to_vec(),
    };
    let saved = filled(&model, 3);
    saved.save(&file, &extra).expect("room");
    let refused = |model, options: &SessionOptions| Session::load(model, &file, options).err();
    let error = refused(&other, &options()).expect("another model");
    assert!(matches!(error, Error::Mismatch { .. }), "{error}");
    let f32 = SessionOptions {
        kv: KvType::F32.into(),
        ..options()
    };
    let error = refused(&model, &f32).expect("another cache type");
    assert!(matches!(error, Error::Mismatch { .. }), "{error}");
    let short = SessionOptions {
        n_ctx: 100,
        ..options()
    };
    let error = refused(&model, &short).expect("no room");
    assert!(
        matches!(error, Error::ContextFull { n_ctx: 100, .. }),
        "{error}"
    );
    // What the application added can be had in any case.
    let found = StateFile::open(&file).and_then(StateFile::extra);
    assert_eq!(found.expect("sound"), extra);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = fs::metadata(&file).expect("a file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}

/// `KINGLET_SESSION_KILLS=500` kills that often.
#[test]
fn killed_at_any_instant_the_old_state_or_the_new_one_is_there() {
    let model = tiny();
    let sessions = [filled(&model, 4), filled(&model, 5)];
    if let Some(file) = std::env::var_os(FILE) {
        println!("\nready");
        for session in sessions.iter().cycle() {
            session
                .save(Path::new(&file), &Extra::default())
                .expect("room");
        }
    }
    let folder = folder("kill");
    let file = folder.join("it.state");
    sessions[0].save(&file, &Extra::default()).expect("room");
    let kills = std::env::var("KINGLET_SESSION_KILLS").ok();
    let kills = kills.map_or(8, |n| n.parse().expect("a number"));
    let mut random = Random::new(6);
    let (mut left, mut seen) = (0, [0; 2]);
    for _ in 0..kills {
        let name = "files::killed_at_any_instant_the_old_state_or_the_new_one_is_there";
        let mut child = child(name, &file)
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process");
        let out = child.stdout.as_mut().expect("a pipe");
        let lines = std::io::BufRead::lines(std::io::BufReader::new(out));
        assert!(lines.map_while(Result::ok).any(|line| line == "ready"));
        std::thread::sleep(Duration::from_micros(random.below(30_000) as u64));
        child.kill().expect("it runs");
        child.wait().expect("it ended");
        left += usize::from(fs::read_dir(&folder).expect("a folder").count() > 1);
        let found = Session::load(&model, &file, &options()).expect("one of the two states");
        let which = sessions.iter().position(|s| s.tokens() == found.tokens());
        let which = which.expect("one of the two states");
        assert!(bits(found.logits()) == bits(sessions[which].logits()));
        seen[which] += 1;
    }
    println!("{kills} kills: states {seen:?}, a temporary left after {left} of them");
    sessions[0].save(&file, &Extra::default()).expect("room");
    assert_eq!(
        fs::read_dir(&folder).expect("a folder").count(),
        1,
        "no temporary stays"
    );
}
