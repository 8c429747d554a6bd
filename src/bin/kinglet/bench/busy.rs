//! Contention: processes of this program that only spin, beside a measurement. Processes and not threads, as what takes
//! a core away from a user is one too.

use std::io::Read;
use std::process::{Child, Command, Stdio};

use crate::failure::Outcome;

/// Busy processes, until this is dropped.
pub struct Busy(Vec<Child>);

impl Busy {
    /// Starts `n`, and returns when all of them spin.
    pub fn start(n: usize) -> Outcome<Self> {
        let mut busy = Self(Vec::new());
        for _ in 0..n {
            let mut command = Command::new(std::env::current_exe()?);
            command
                .arg("spin")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped());
            busy.0.push(command.spawn()?);
        }
        for child in &mut busy.0 {
            let mut ready = [0];
            let stdout = child.stdout.as_mut().expect("a pipe was asked for");
            stdout.read_exact(&mut ready)?;
        }
        Ok(busy)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // One that has ended already cannot be killed, and need not be.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// `kinglet spin`: says that it is there, and spins until stdin ends, which it does when the parent is gone.
pub fn spin() -> Outcome {
    std::thread::spawn(|| {
        let mut rest = Vec::new();
        let _ = std::io::stdin().read_to_end(&mut rest); // an error ends it too
        std::process::exit(0);
    });
    use std::io::Write;
    let mut out = std::io::stdout();
    out.write_all(b"1")?;
    out.flush()?;
    loop {
        std::hint::spin_loop();
    }
}
