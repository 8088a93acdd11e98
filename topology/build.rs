//! Puts a name for this build into `CLUSTER_BUILD`, which both ends of a link compare.
//!
//! In a release build it is the git revision, with `+` where files differ from it. Otherwise, and
//! where there is no git, it is the profile: a development build must not be made anew with every
//! commit. Never fails.

use std::env;
use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[expect(
        clippy::disallowed_methods,
        reason = "cargo speaks to build scripts through it"
    )]
    let profile = env::var("PROFILE").unwrap_or_default();
    let revision = if profile == "release" {
        revision()
    } else {
        None
    };
    println!(
        "cargo::rustc-env=CLUSTER_BUILD={}",
        revision.unwrap_or(profile)
    );
}

fn revision() -> Option<String> {
    // A commit moves one of these; without them cargo would keep an old name. Not the index: whoever only looks at the
    // tree writes it, and everything would be built anew.
    for name in ["HEAD", "logs/HEAD"] {
        let path = git(&["rev-parse", "--git-path", name])?;
        if Path::new(&path).exists() {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    let revision = git(&["rev-parse", "--short=12", "HEAD"])?;
    let is_changed = !git(&[
        "--no-optional-locks",
        "status",
        "--porcelain",
        "--untracked-files=no",
    ])?
    .is_empty();
    Some(if is_changed {
        format!("{revision}+")
    } else {
        revision
    })
}

/// What git answers, or `None` if there is no git or no repository.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
