//! Words and scripts, read by a real shell; what `ssh` says, read by people.

use super::*;
use crate::random::{Random, seed};

fn target() -> Target {
    Target {
        host: "-oProxyCommand=touch /tmp/x".into(),
        user: Some("someone".into()),
        port: Some(2222),
        identity: Some("/keys/a b".into()),
        jump: Some("bastion".into()),
        config: None,
    }
}

#[test]
fn hosts_are_never_options_and_words_never_commands() {
    let arguments = target().arguments(SHARD, &["/x y/$(id)/'`", "info; rm -rf /"]);
    let text: Vec<_> = arguments.iter().map(|a| a.to_str().unwrap()).collect();
    let [.., dashes, host, remote] = text.as_slice() else {
        panic!("{text:?}");
    };
    assert_eq!((*dashes, *host), ("--", "-oProxyCommand=touch /tmp/x"));
    assert!(
        remote.ends_with(r"cluster '/x y/$(id)/'\''`' 'info; rm -rf /'"),
        "{remote}"
    );
    for option in ["BatchMode=yes", "StrictHostKeyChecking=yes"] {
        assert!(text.contains(&option), "{option}");
    }
    assert!(text.windows(2).any(|pair| pair == ["-i", "/keys/a b"]));
    assert!(text.windows(2).any(|pair| pair == ["-J", "bastion"]));
}

#[test]
fn a_shell_reads_each_word_as_it_was() {
    let seed = seed(21);
    println!("seed {seed}");
    let mut random = Random::new(seed);
    for _ in 0..50 {
        let marks = [
            '\'', '"', '$', '`', '\\', ' ', '*', ';', '\n', '&', 'ä', 'x', '-', '!',
        ];
        let word: String = (0..random.below(20))
            .map(|_| *random.pick(&marks))
            .collect();
        let script = format!(
            "exec /bin/sh -c {} cluster {}",
            quote("printf '%s|' \"$1\""),
            quote(&word)
        );
        let output = std::process::Command::new("/bin/sh")
            .args(["-c", &script])
            .output();
        let said = String::from_utf8(output.unwrap().stdout).unwrap();
        assert_eq!(said, format!("{word}|"));
    }
}

#[test]
fn the_copy_is_whole_or_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let work_dir = dir.path().join("it's new/work");
    let program = dir.path().join("program");
    std::fs::write(&program, "#!/bin/sh\necho \"$@\"\n").unwrap();
    let image = Image::read(&program).unwrap();
    let run = |script: &str, words: &[&str], stdin: Stdio| {
        let mut sh = std::process::Command::new("/bin/sh");
        let sh = sh.args(["-c", script, "cluster"]).args(words).stdin(stdin);
        let output = sh.output().unwrap();
        (
            output.status.success(),
            String::from_utf8(output.stdout).unwrap(),
        )
    };
    let place = work_dir.join(image.name());
    let place = place.to_str().unwrap();
    assert_eq!(run(HASH, &[place], Stdio::null()), (true, "none\n".into()));
    let name = image.name();
    let words = [work_dir.to_str().unwrap(), &name, &image.hash];
    // Broken off: nothing stays.
    assert!(!run(COPY, &words, Stdio::null()).0);
    assert_eq!(std::fs::read_dir(&work_dir).unwrap().count(), 0);
    assert!(run(COPY, &words, File::open(&program).unwrap().into()).0);
    assert!(
        run(COPY, &words, File::open(&program).unwrap().into()).0,
        "again"
    );
    assert_eq!(std::fs::read_dir(&work_dir).unwrap().count(), 1);
    let (_, hash) = run(HASH, &[place], Stdio::null());
    assert!(hash.starts_with(&image.hash), "{hash}");
    for (before, more) in [("", ""), ("{\"it's\": 1}", " --after {\"it's\": 1}")] {
        let (_, said) = run(SHARD, &[place, "a b", before], Stdio::null());
        assert_eq!(said, format!("shard --log a b{more}\n"));
    }
}

#[test]
fn a_shard_is_told_its_variables_and_a_nodes_own_come_before_proposals() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("it's a program");
    std::fs::write(&program, "#!/bin/sh\nenv | grep ^T_ | sort\necho \"$@\"\n").unwrap();
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(&program, executable).unwrap();
    let variable = |name, value: &str, is_proposal| Variable {
        name,
        value: value.into(),
        is_proposal,
    };
    let environment = [
        variable("T_PROPOSED", "a ?= $(id) 'b'", true),
        variable("T_SET_THERE", "ours", true),
        variable("T_FIXED", "=eth0", false),
    ];
    let variables = words(&environment);
    let words = [program.to_str().unwrap(), "info", ""].into_iter();
    let words: Vec<&str> = words.chain(variables.iter().map(String::as_str)).collect();
    // As sshd runs it: the whole command is one text for the user's shell.
    let arguments = target().arguments(SHARD, &words);
    let mut sh = std::process::Command::new("/bin/sh");
    let sh = sh.arg("-c").arg(arguments.last().unwrap());
    let output = sh
        .env("T_SET_THERE", "theirs")
        .env("T_FIXED", "theirs")
        .output();
    let said = String::from_utf8(output.unwrap().stdout).unwrap();
    let expected =
        "T_FIXED==eth0\nT_PROPOSED=a ?= $(id) 'b'\nT_SET_THERE=theirs\nshard --log info\n";
    assert_eq!(said, expected);
}

#[test]
fn refusals_say_what_to_do() {
    for (wrote, said) in [
        ("Host key verification failed.", "known_hosts"),
        (
            "root@x: Permission denied (publickey).",
            "does not accept this user's key",
        ),
        ("ssh: connect to host x port 22: Connection refused", "sshd"),
        ("ssh: Could not resolve hostname x", "check `host`"),
        ("exec: /w/cluster-1: Permission denied", "noexec"),
        ("something new", "something new"),
    ] {
        let error = LaunchError::Handshake(wrote.to_owned());
        let error = target().explain(error).to_string();
        assert!(
            error.contains(said) && error.contains("someone@"),
            "{error}"
        );
    }
    let error = no_ssh(&io::ErrorKind::NotFound.into()).to_string();
    assert!(error.contains("openssh-client"));
}
