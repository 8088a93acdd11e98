//! Shard processes of other nodes, started through the system's `ssh`.
//!
//! `ssh` runs as a child of this process and carries the handshake of [`super`]: what it needs to know
//! stands in its arguments, as a vector; nothing secret does. The user's own `ssh_config`, keys and
//! agent apply; nobody is asked for a password, and a host whose key is unknown is refused. When `ssh` is
//! gone the shard knows, because its standard input ends then; without a terminal no signal reaches it.
//!
//! Invariants: no text of the operator is ever read by a shell as more than one word; a program that
//! runs on a node is byte for byte this one, because its file's name is its hash.

mod away;

pub use away::Away;

use super::environment::Variable;
use super::errand::Errand;
use super::local::{self, Started};
use super::{LaunchError, within};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::ffi::OsString;
use std::fmt::{self, Write as _};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;
use tokio::process::Command;
use tokio::sync::OnceCell;

/// Longest time to reach a node and be let in.
const CONNECT_SECONDS: u32 = 8;
/// Longest time of a short command on a node.
const COMMAND_LIMIT: Duration = Duration::from_secs(20);
/// Longest time to copy the program: 100 MB over 10 Mbit/s.
const COPY_LIMIT: Duration = Duration::from_secs(120);
/// Longest part of what `ssh` or the node wrote that is shown.
const SHOWN: usize = 300;

/// Says the hash of a file, if it is there. `$1`: the file.
const HASH: &str = r#"[ -x "$1" ] && sha256sum < "$1" || echo none"#;
/// Takes the program from standard input. `$1`: directory, `$2`: name, `$3`: hash. A copy that breaks off
/// or arrives wrong never gets the name.
const COPY: &str = r#"umask 077 && mkdir -p -- "$1" && cd -- "$1" || exit 1
new=".$2.$$"
trap 'rm -f -- "$new"' EXIT
cat > "$new" && [ "$(sha256sum < "$new")" = "$3  -" ] && chmod 700 "$new" && mv -f -- "$new" "$2""#;
/// Becomes the shard. `$1`: the program, `$2`: what it logs, `$3`: whose place it takes, or nothing, the rest: variables, as `NAME=VALUE`, or as
/// `NAME?=VALUE` where the node's own environment comes first.
const SHARD: &str = r#"program=$1 log=$2 before=$3
shift 3
for variable
do
    shift
    case "$variable" in
    *\?=*)
        name="${variable%%\?*}"
        if printenv "$name" > /dev/null; then continue; fi
        variable="$name=${variable#*\?=}" ;;
    esac
    set -- "$@" "$variable"
done
exec env "$@" "$program" shard --log "$log" ${before:+--after "$before"}"#;
/// Becomes the process that answers questions about the node. `$1`: the program.
const EXAMINE: &str = r#"exec "$1" shard --examine"#;
/// Says how much memory there is.
const MEMORY: &str = "cat /proc/meminfo";

/// How `ssh` reaches a node; what is not said here is `ssh_config`'s to say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Host name, address, or a `Host` of `ssh_config`.
    pub host: String,
    /// Whom to be there.
    pub user: Option<String>,
    /// Its port.
    pub port: Option<u16>,
    /// File of a private key.
    pub identity: Option<PathBuf>,
    /// Hosts to go through, as `ProxyJump` takes them.
    pub jump: Option<String>,
    /// A configuration file to use instead of the user's, as `ssh -F` takes it.
    pub config: Option<PathBuf>,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(user) = &self.user {
            write!(f, "{user}@")?;
        }
        f.write_str(&self.host)
    }
}

impl Target {
    /// The arguments of `ssh` that have `/bin/sh` on the node run `script` with `words` as `$1`, `$2`, ….
    fn arguments(&self, script: &str, words: &[&str]) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = Vec::new();
        let mut add = |flag: &str, value: OsString| arguments.extend([flag.into(), value]);
        if let Some(config) = &self.config {
            add("-F", config.into());
        }
        if let Some(user) = &self.user {
            add("-l", user.into());
        }
        if let Some(port) = self.port {
            add("-p", port.to_string().into());
        }
        if let Some(identity) = &self.identity {
            add("-i", identity.into());
            add("-o", "IdentitiesOnly=yes".into());
        }
        if let Some(jump) = &self.jump {
            add("-J", jump.into());
        }
        for option in [
            // Nobody is there to type.
            "BatchMode=yes",
            "StrictHostKeyChecking=yes",
            &format!("ConnectTimeout={CONNECT_SECONDS}"),
            // A node that is cut off: its link to the coordinator is lost sooner.
            "ServerAliveInterval=5",
            "ServerAliveCountMax=3",
            // Each shard has a connection of its own, which ends with it.
            "ControlMaster=no",
            "ControlPath=none",
            "ForwardAgent=no",
            "ForwardX11=no",
            "ClearAllForwardings=yes",
            "PermitLocalCommand=no",
            "EscapeChar=none",
            "RequestTTY=no",
            "LogLevel=ERROR",
        ] {
            add("-o", option.into());
        }
        let mut remote = format!("exec /bin/sh -c {} cluster", quote(script));
        for word in words {
            remote.push(' ');
            remote.push_str(&quote(word));
        }
        arguments.extend(["--".into(), self.host.clone().into(), remote.into()]);
        arguments
    }

    /// Runs a short command on the node. Its output, if it ended well.
    async fn run(
        &self,
        (script, words): (&str, &[&str]),
        stdin: Stdio,
        limit: Duration,
    ) -> Result<String, LaunchError> {
        let mut command = Command::new("ssh");
        command
            .args(self.arguments(script, words))
            .stdin(stdin)
            .process_group(0)
            .kill_on_drop(true);
        local::without_private_variables(&mut command);
        let output = within(limit, "a command on the node", async {
            command.output().await.map_err(|e| no_ssh(&e))
        });
        let Output {
            status,
            stdout,
            stderr,
        } = output.await.map_err(|e| self.explain(e))?;
        if status.success() {
            return Ok(String::from_utf8_lossy(&stdout).into_owned());
        }
        let words = String::from_utf8_lossy(&stderr);
        Err(self.explain(LaunchError::Handshake(format!(
            "{status}: {}",
            words.trim()
        ))))
    }

    /// What is wrong, as far as `ssh`'s words tell, and what to do.
    fn explain(&self, error: LaunchError) -> LaunchError {
        if let LaunchError::Io(_) | LaunchError::Node(_) = error {
            return error;
        }
        let words = error.to_string();
        let has = |parts: &[&str]| parts.iter().any(|part| words.contains(part));
        let advice = if has(&["Host key verification failed", "No matching host key"]) {
            "its host key is not known here, or has changed; compare it with the node's and add it to \
             known_hosts (ssh to it once by hand)"
        } else if has(&["Permission denied (", "Too many authentication failures"]) {
            "it does not accept this user's key; see that `ssh` gets in without a password \
             (`user` and `identity` in the topology file, ssh-agent, authorized_keys there)"
        } else if has(&["Could not resolve", "Name or service not known"]) {
            "its name is not known; check `host` in the topology file"
        } else if has(&[
            "Connection refused",
            "timed out",
            "took longer than",
            "No route to host",
            "Network is unreachable",
            "Connection closed",
            "Connection reset",
        ]) {
            "it cannot be reached; see that it is up, that `host` and `port` are right and that sshd \
             listens there"
        } else if has(&[
            "Permission denied",
            "not executable",
            "Exec format",
            "not found",
        ]) {
            "the program does not run there; see that `work_dir` may hold programs (no noexec) and that \
             the node has this machine's architecture and a C library as new"
        } else {
            "see what it wrote"
        };
        let shown: String = words.chars().take(SHOWN).collect();
        LaunchError::Node(format!("{self}: {advice} ({shown})"))
    }
}

/// This program, as it is put on nodes.
#[derive(Clone, Debug)]
pub struct Image {
    path: PathBuf,
    hash: String,
}

impl Image {
    /// Reads the program once.
    ///
    /// # Errors
    /// [`LaunchError::Io`] if it cannot be read.
    pub fn read(path: &Path) -> Result<Self, LaunchError> {
        let mut hasher = Sha256::new();
        let read = File::open(path).and_then(|mut file| io::copy(&mut file, &mut hasher));
        read.map_err(|e| LaunchError::Io(format!("cannot read {}: {e}", path.display())))?;
        let mut hash = String::new();
        for byte in hasher.finalize() {
            let _ = write!(hash, "{byte:02x}"); // strings do not fail
        }
        let path = path.to_owned();
        Ok(Self { path, hash })
    }

    /// Its file's name on nodes. Another hash is another file: a program that runs is never written to.
    pub fn name(&self) -> String {
        format!("cluster-{}", &self.hash[..16])
    }
}

/// A node that `ssh` reaches, and this program on it.
#[derive(Debug)]
pub struct Remote {
    target: Target,
    work_dir: String,
    image: Image,
    /// Set once the program is there: whether it was copied.
    installed: OnceCell<bool>,
}

impl Remote {
    /// A node whose `work_dir` holds what is put there; nothing is done yet.
    pub fn new(target: Target, work_dir: String, image: Image) -> Self {
        Self {
            target,
            work_dir,
            image,
            installed: OnceCell::new(),
        }
    }

    fn program(&self) -> String {
        format!(
            "{}/{}",
            self.work_dir.trim_end_matches('/'),
            self.image.name()
        )
    }

    /// Sees that the node has this very program, and copies it there if not. Whether it was copied. Once it is
    /// there this does nothing.
    ///
    /// # Errors
    /// [`LaunchError`] with what to do: `ssh` is missing, the node does not let this user in, or its
    /// `work_dir` cannot be written.
    pub async fn install(&self) -> Result<bool, LaunchError> {
        let install = async || self.copy_if_missing().await;
        self.installed.get_or_try_init(install).await.copied()
    }

    async fn copy_if_missing(&self) -> Result<bool, LaunchError> {
        let program = self.program();
        let hash = (HASH, &[&*program][..]);
        let said = self.target.run(hash, Stdio::null(), COMMAND_LIMIT).await?;
        // A login shell may have printed something before.
        let last = said.lines().last().unwrap_or_default();
        if last.split_whitespace().next() == Some(&*self.image.hash) {
            return Ok(false);
        }
        let path = &self.image.path;
        let file = File::open(path)
            .map_err(|e| LaunchError::Io(format!("cannot read {}: {e}", path.display())))?;
        let name = self.image.name();
        let words = [self.work_dir.as_str(), &name, &self.image.hash];
        let copied = self
            .target
            .run((COPY, &words), file.into(), COPY_LIMIT)
            .await;
        copied.map_err(|e| {
            LaunchError::Node(format!("cannot copy the program to {}: {e}", self.work_dir))
        })?;
        Ok(true)
    }

    /// Starts a shard on the node and waits for its announcement; the first one brings the program. What is left of the
    /// one `before` it there is ended first.
    /// The rest is as for a local shard, but killing its process here kills `ssh`; the shard is dismissed
    /// ([`local::Process::dismiss`]), or ended for good ([`Away::end`]).
    ///
    /// # Errors
    /// [`LaunchError`] with what to do.
    pub async fn start(
        &self,
        log: &str,
        environment: &[Variable],
        before: Option<&Away>,
    ) -> Result<Started, LaunchError> {
        self.install().await?;
        let (program, variables) = (self.program(), words(environment));
        let before = before.map(Away::charge).transpose()?.unwrap_or_default();
        let words = [&*program, log, &before].into_iter();
        let words: Vec<&str> = words.chain(variables.iter().map(String::as_str)).collect();
        let arguments = self.target.arguments(SHARD, &words);
        let started = local::start("ssh".as_ref(), arguments).await;
        started.map_err(|error| self.target.explain(error))
    }

    /// Starts a process on the node that answers questions about it. The program must be there
    /// ([`Self::install`]).
    ///
    /// # Errors
    /// [`LaunchError`] if there is no `ssh`; what else goes wrong, its first answer says.
    pub fn examine(&self) -> Result<Errand, LaunchError> {
        let arguments = self.target.arguments(EXAMINE, &[&self.program()]);
        Errand::start("ssh".as_ref(), arguments)
    }
}

/// Variables as [`SHARD`] reads them.
fn words(environment: &[Variable]) -> Vec<String> {
    let word = |variable: &Variable| {
        let Variable { name, value, .. } = variable;
        let mark = if variable.is_proposal { "?=" } else { "=" };
        format!("{name}{mark}{value}")
    };
    environment.iter().map(word).collect()
}

/// The node's `/proc/meminfo`, which a login shell may have put something before.
///
/// # Errors
/// [`LaunchError`] with what to do.
pub async fn meminfo(target: &Target) -> Result<String, LaunchError> {
    target
        .run((MEMORY, &[]), Stdio::null(), COMMAND_LIMIT)
        .await
}

pub(super) fn no_ssh(error: &io::Error) -> LaunchError {
    let reason = match error.kind() {
        io::ErrorKind::NotFound => {
            "cannot start ssh: it is not installed; install an OpenSSH client (openssh-client)"
                .into()
        }
        _ => format!("cannot start ssh: {error}"),
    };
    LaunchError::Io(reason)
}

/// One word for a POSIX shell, whatever it holds.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests;
