//! The shard's side of a launch.

use super::{Announcement, Launch, LaunchError, MAX_LINE_BYTES, from_line, to_line, within};
use crate::link::{Identity, LinkError};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Stdin};

/// The parent's pipe, after its one line.
#[derive(Debug)]
pub struct Parent(BufReader<Stdin>);

impl Parent {
    /// Returns when the parent has closed the pipe or is gone: the shard must exit then.
    pub async fn gone(mut self) {
        let mut ignored = [0; 256];
        while matches!(self.0.read(&mut ignored).await, Ok(1..)) {}
    }
}

/// Makes this process's key, shows its public half on standard output, and reads what to do from
/// standard input.
///
/// # Errors
/// [`LaunchError`] if the parent does not answer in time, or not with a [`Launch`].
pub async fn announce() -> Result<(Launch, Identity, Parent), LaunchError> {
    let identity = Identity::generate().map_err(|e: LinkError| LaunchError::Io(e.to_string()))?;
    let line = to_line(&Announcement {
        certificate: identity.certificate().clone(),
    })?;
    let io = |e: std::io::Error| LaunchError::Io(format!("cannot talk to the parent process: {e}"));
    let mut stdout = tokio::io::stdout();
    let mut stdin = BufReader::new(tokio::io::stdin());
    let launch = within("waiting for the parent to say what to do", async {
        stdout.write_all(&line).await.map_err(io)?;
        stdout.flush().await.map_err(io)?;
        let mut line = String::new();
        (&mut stdin)
            .take(MAX_LINE_BYTES)
            .read_line(&mut line)
            .await
            .map_err(io)?;
        from_line::<Launch>(&line, "the parent")
    });
    Ok((launch.await?, identity, Parent(stdin)))
}
