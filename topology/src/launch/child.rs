//! The shard's side of a launch.
//!
//! One thread reads standard input for as long as the process lives: the first line says what to do,
//! the end of it that the parent is gone. Invariant: no shard outlives its parent by more than
//! [`ORPHAN_LIMIT`], whatever its other threads are stuck in.

use super::{Announcement, LAUNCH_LIMIT, Launch, LaunchError, MAX_LINE_BYTES};
use super::{from_line, to_line, within};
use crate::link::Identity;
use std::io::{self, BufRead, Read, Write};
use std::process;
use std::thread;
use std::time::Duration;
use tokio::sync::oneshot;

/// How long after its parent a shard may live: time to drop what other processes might see.
pub const ORPHAN_LIMIT: Duration = Duration::from_secs(5);

/// Exit status of a shard that had to be ended that way.
const EXIT_ORPHANED: i32 = 4;

/// The parent, as seen from here.
#[derive(Debug)]
pub struct Parent(oneshot::Receiver<()>);

impl Parent {
    /// Returns when the parent has closed the pipe or is gone: the shard must exit then, and is ended
    /// if it has not within [`ORPHAN_LIMIT`].
    pub async fn gone(self) {
        // Nothing is ever sent: the reader drops its end.
        let _ = self.0.await;
    }
}

/// Makes this process's key, shows its public half on standard output, and reads what to do from
/// standard input.
///
/// # Errors
/// [`LaunchError`] if the parent does not answer in time, or not with a [`Launch`].
pub async fn announce() -> Result<(Launch, Identity, Parent), LaunchError> {
    let identity = Identity::generate().map_err(|e| LaunchError::Io(e.to_string()))?;
    let line = to_line(&Announcement {
        certificate: identity.certificate().clone(),
    })?;
    let io = |e: io::Error| LaunchError::Io(format!("cannot talk to the parent process: {e}"));
    let mut stdout = io::stdout().lock();
    stdout.write_all(&line).map_err(io)?;
    stdout.flush().map_err(io)?;
    drop(stdout);

    let (first, said) = oneshot::channel();
    let (alive, gone) = oneshot::channel();
    // A thread and not a task: a read of standard input cannot be cancelled, and this one must
    // work on when the runtime does not.
    let reader = thread::Builder::new()
        .name("parent".to_owned())
        .spawn(move || {
            let mut stdin = io::stdin().lock();
            let mut line = String::new();
            let read = (&mut stdin).take(MAX_LINE_BYTES).read_line(&mut line);
            // Where nobody waits for the line any more, the process is ending.
            let _ = first.send(read.map(|_| line));
            let _ = io::copy(&mut stdin, &mut io::sink());
            drop(alive);
            thread::sleep(ORPHAN_LIMIT);
            process::exit(EXIT_ORPHANED);
        });
    reader.map_err(io)?;
    let launch = within(
        LAUNCH_LIMIT,
        "waiting for the parent to say what to do",
        async {
            let line = said
                .await
                .map_err(|_| LaunchError::Io("the reader ended".to_owned()))?;
            from_line::<Launch>(&line.map_err(io)?, "the parent")
        },
    );
    Ok((launch.await?, identity, Parent(gone)))
}
