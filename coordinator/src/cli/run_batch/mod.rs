//! `cluster run-batch`: answers the requests of a file into another file, however often it is cut off.
//!
//! The files are those of OpenAI's batches and `vllm run-batch`. An output line is on disk before its request
//! counts as answered, so that the output is its own journal: the same command goes on where it was killed, and
//! requests that a dying server took along are asked again. Decides nothing about how requests are computed.
//!
//! Invariant: the output never has two lines for one `custom_id`.

mod ask;
mod input;
mod journal;
#[cfg(test)]
mod tests;

use super::args::RunBatch;
use super::{EXIT_FAULT, EXIT_INPUT, complain};
use crate::clock::{now, since};
use anyhow::{Context, Result, bail};
use ask::{Asker, Hopeless, Server};
use input::{Input, Line};
use journal::Journal;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// Answers that may wait to be written, for each request under way: all of them at once.
const ANSWERS_PER_WORKER: usize = 1;

/// Runs the command.
pub(super) fn run(flags: &RunBatch) -> ExitCode {
    let begun = now();
    let (batch, journal) = match prepare(flags) {
        Ok(prepared) => prepared,
        Err(error) => return complain(&error, EXIT_INPUT),
    };
    let (total, left) = (batch.input.lines.len(), batch.todo.len());
    if left < total {
        note(&format!(
            "{} of {total} requests are answered already",
            total - left
        ));
    }
    let batch = Arc::new(batch);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let ended = runtime
        .context("cannot start a thread")
        .and_then(|runtime| runtime.block_on(work(&batch, journal, flags.max_concurrency)));
    let (answered, refused) = (
        batch.answered.load(Ordering::Relaxed),
        batch.refused.load(Ordering::Relaxed),
    );
    match ended {
        Ok(()) => {
            let seconds = since(begun).as_secs_f64();
            note(&format!(
                "{answered} requests answered in {seconds:.1} s, {refused} of them with an error"
            ));
            ExitCode::SUCCESS
        }
        Err(error) => {
            let done = total - left + usize::try_from(answered).unwrap_or(usize::MAX);
            let (command, code) = if error.is::<Hopeless>() {
                ("corrected", EXIT_INPUT)
            } else {
                ("same", EXIT_FAULT)
            };
            let error = error.context(format!(
                "{done} of {total} requests are answered; the {command} command goes on from there"
            ));
            complain(&error, code)
        }
    }
}

/// What all workers share.
struct Batch {
    input: Input,
    /// Requests that have no answer yet, as indices.
    todo: Vec<usize>,
    /// The next one of those to be taken.
    next: AtomicUsize,
    server: Server,
    model: Option<String>,
    retry_limit: Duration,
    hearing: Mutex<Hearing>,
    answered: AtomicU64,
    refused: AtomicU64,
}

/// What all workers together have heard of the server.
struct Hearing {
    /// When it last took something, or said that it has enough to do.
    last: Instant,
    /// Since when it has taken nothing; `None`: no try has failed since it was last heard.
    silent_since: Option<Instant>,
}

/// Reads the files, and finds the server once: what is wrong there is the user's to change.
fn prepare(flags: &RunBatch) -> Result<(Batch, Journal)> {
    let input = Input::open(&flags.input_file)?;
    let (journal, done) = Journal::open(&flags.output_file)?;
    let known: HashSet<_> = input.lines.iter().map(|line| &line.custom_id).collect();
    if let Some(stranger) = done.iter().find(|id| !known.contains(id)) {
        bail!(
            "{} has an answer to `{stranger}`, which {} does not ask; give another --output-file",
            flags.output_file.display(),
            flags.input_file.display()
        );
    }
    let open = input.lines.iter().enumerate();
    let open = open.filter(|(_, line)| !done.contains(&line.custom_id));
    let todo = open.map(|(index, _)| index).collect();
    let batch = Batch {
        server: Server::find(flags)?,
        todo,
        next: AtomicUsize::new(0),
        model: flags.model.clone(),
        retry_limit: Duration::from_secs(flags.retry_timeout.into()),
        hearing: Mutex::new(Hearing {
            last: now(),
            silent_since: None,
        }),
        answered: AtomicU64::new(0),
        refused: AtomicU64::new(0),
        input,
    };
    Ok((batch, journal))
}

/// Answers everything that is open. The first failure ends the others: nothing that they have under way is
/// lost, only asked again.
async fn work(batch: &Arc<Batch>, mut journal: Journal, workers: u32) -> Result<()> {
    let workers = (workers as usize).min(batch.todo.len());
    let (answers, mut written) = mpsc::channel::<Value>(ANSWERS_PER_WORKER * workers.max(1));
    let counted = Arc::clone(batch);
    let writer = tokio::task::spawn_blocking(move || {
        while let Some(first) = written.blocking_recv() {
            let mut lines = vec![first];
            while let Ok(line) = written.try_recv() {
                lines.push(line);
            }
            journal.append(&lines)?;
            counted.count(&lines);
        }
        anyhow::Ok(())
    });
    let mut tasks = JoinSet::new();
    for _ in 0..workers {
        tasks.spawn(one_after_the_other(Arc::clone(batch), answers.clone()));
    }
    drop(answers);
    let mut ended = Ok(());
    while let Some(task) = tasks.join_next().await {
        let task = task.context("a worker panicked").and_then(|task| task);
        if ended.is_ok() && task.is_err() {
            ended = task;
            tasks.abort_all();
        }
    }
    // A full disk is why workers could not go on.
    writer.await.context("the writer panicked")??;
    ended
}

async fn one_after_the_other(batch: Arc<Batch>, answers: mpsc::Sender<Value>) -> Result<()> {
    let mut asker = Asker::default();
    loop {
        let next = batch.next.fetch_add(1, Ordering::Relaxed);
        let Some(index) = batch.todo.get(next) else {
            return Ok(());
        };
        let line = &batch.input.lines[*index];
        let answer = batch.answer(line, &mut asker).await?;
        let sent = answers.send(answer).await;
        sent.context("the answers cannot be written")?;
    }
}

impl Batch {
    /// The output line for an input line.
    async fn answer(&self, line: &Line, asker: &mut Asker) -> Result<Value> {
        let request = self.input.read(line)?;
        let request = match request.checked(self.model.as_deref()) {
            Ok(request) => request,
            Err(why) => return Ok(output(&line.custom_id, 400, None, refusal(&why))),
        };
        let answer = asker.ask(&request, (&self.server, self)).await?;
        Ok(output(
            &line.custom_id,
            answer.status,
            answer.id,
            answer.body,
        ))
    }

    fn hearing(&self) -> MutexGuard<'_, Hearing> {
        let lock = self.hearing.lock();
        lock.unwrap_or_else(PoisonError::into_inner)
    }

    /// The server took something, or said that it has enough to do.
    fn heard(&self) {
        *self.hearing() = Hearing {
            last: now(),
            silent_since: None,
        };
    }

    /// A try failed, and the server has said nothing to its worker since then; whether it has taken nothing of
    /// anyone's for longer than may be.
    fn is_silent_too_long(&self, alone_since: Instant) -> bool {
        let mut hearing = self.hearing();
        let begun = alone_since.max(hearing.last);
        let begun = hearing.silent_since.map_or(begun, |it| it.min(begun));
        hearing.silent_since = Some(begun);
        since(begun) > self.retry_limit
    }

    fn count(&self, lines: &[Value]) {
        let refused = lines.iter().filter(|line| !line["error"].is_null()).count();
        self.refused.fetch_add(refused as u64, Ordering::Relaxed);
        self.answered
            .fetch_add(lines.len() as u64, Ordering::Relaxed);
    }
}

/// A line as `vllm run-batch` writes it: what is no answer stands under `error`.
fn output(custom_id: &str, status: u16, request_id: Option<String>, body: Value) -> Value {
    let id = |kind: &str| format!("{kind}-{}", uuid::Uuid::new_v4().simple());
    let is_ok = (200..300).contains(&status);
    let (body, error) = if is_ok {
        (body, Value::Null)
    } else {
        (Value::Null, body)
    };
    json!({
        "id": id("batch"),
        "custom_id": custom_id,
        "response": {
            "status_code": status,
            "request_id": request_id.unwrap_or_else(|| id("batch-request")),
            "body": body,
        },
        "error": error,
    })
}

/// What the server would have said.
fn refusal(why: &str) -> Value {
    json!({"error": {"message": why, "type": "BadRequestError", "param": null, "code": 400}})
}

/// For whoever watches; a closed standard error must not stop it.
fn note(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}
