//! Names the commit for `kinglet bench`: results without one cannot be compared.

use std::process::Command;

fn main() {
    // Not on each commit: what was built is what the sources were.
    println!("cargo:rerun-if-changed=src");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-env=KINGLET_COMMIT={}", commit());
}

/// The commit of the working tree, with `-dirty` if sources differ from it; `unknown` outside a repository.
fn commit() -> String {
    let git = |args: &[&str]| {
        let output = Command::new("git").args(args).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    // A package that lies in somebody else's repository is not of its commit.
    let ours = git(&["ls-files", "build.rs"]).is_some_and(|name| name == "build.rs");
    match git(&["rev-parse", "--short=9", "HEAD"]) {
        Some(commit) if ours => match git(&["status", "--porcelain", "--", "src"]) {
            Some(changes) if changes.is_empty() => commit,
            _ => format!("{commit}-dirty"),
        },
        _ => "unknown".to_owned(),
    }
}
