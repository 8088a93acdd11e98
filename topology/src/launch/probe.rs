//! Asks a short-lived child process what GPUs this host has.
//!
//! A child, because GPU libraries start threads, take memory and may hang in a broken driver: none of
//! that belongs in the coordinator. Decides nothing from the answer. Invariant: the child is gone
//! when the answer is returned.

use super::{LAUNCH_LIMIT, LaunchError, from_line};
use crate::gpus::Probe;
use std::ffi::OsStr;
use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;

/// Longest answer in bytes: a description of hundreds of GPUs fits.
const MAX_ANSWER_BYTES: u64 = 256 << 10;

/// Runs `program arguments…` and reads the [`Probe`] that it prints as the last line of its output.
///
/// # Errors
/// [`LaunchError`] if it does not start, prints something else, or takes longer than [`LAUNCH_LIMIT`].
pub fn gpus<A: AsRef<OsStr>>(
    program: &OsStr,
    arguments: impl IntoIterator<Item = A>,
) -> Result<Probe, LaunchError> {
    let failed = |error| LaunchError::Io(format!("cannot start {}: {error}", program.display()));
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let stdout = child.stdout.take();
    let (sender, answer) = mpsc::channel();
    let read = move || {
        let mut text = String::new();
        let read = stdout.map(|stdout| stdout.take(MAX_ANSWER_BYTES).read_to_string(&mut text));
        // Nobody listens only after the deadline.
        let _ = sender.send(read.unwrap_or(Ok(0)).map(|_| text));
    };
    let reader = thread::Builder::new().name("probe".to_owned()).spawn(read);
    let answer = match reader {
        Ok(_) => answer.recv_timeout(LAUNCH_LIMIT).ok(),
        Err(error) => Some(Err(error)),
    };
    // It has nothing more to say, whatever it still does. It may have ended by itself.
    let _ = child.kill();
    let _ = child.wait();
    let text = answer.ok_or(LaunchError::TimedOut {
        what: "asking the driver which GPUs there are",
        limit: LAUNCH_LIMIT,
    })?;
    let text = text.map_err(|e| LaunchError::Io(format!("cannot read from the probe: {e}")))?;
    from_line(
        text.trim_end().lines().last().unwrap_or_default(),
        "the probe",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Result<Probe, LaunchError> {
        gpus(OsStr::new("sh"), ["-c", script])
    }

    #[test]
    fn the_last_line_counts() {
        let probe = shell(r#"echo a library says hello; echo '{"Err":"no driver"}'"#).unwrap();
        assert_eq!(probe, Err("no driver".to_owned()));
        let probe =
            shell(r#"echo '{"Ok":{"gpus":[],"visible":null,"nccl":{"Ok":"/x"}}}'"#).unwrap();
        assert_eq!(probe.unwrap().nccl, Ok("/x".to_owned()));
    }

    #[test]
    fn silence_and_noise_are_told_apart() {
        let silent = shell("exit 3").unwrap_err().to_string();
        assert!(silent.contains("ended before it said anything"), "{silent}");
        let noise = shell("echo hello").unwrap_err().to_string();
        assert!(noise.contains("the probe's line"), "{noise}");
        let missing = gpus(OsStr::new("/no/such"), [""; 0])
            .unwrap_err()
            .to_string();
        assert!(missing.contains("/no/such"), "{missing}");
    }
}
