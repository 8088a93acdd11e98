//! Real processes: this test's own executable, started again as a shard, and shells that misbehave.

use std::ffi::OsStr;
use std::net::Ipv4Addr;
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;
use tokio::time::timeout;
use topology::ids::Rank;
use topology::launch::child::Gone;
use topology::launch::process::ProcessId;
use topology::launch::{Launch, LaunchError, child, local};
use topology::link::{Listener, connect};
use topology::placement::Device;
use topology::wire::{FromShard, Hello, ToShard};

const LIMIT: Duration = Duration::from_secs(30);

/// Says to the function below that it is a shard's process.
const CHILD: &str = "TOPOLOGY_TEST_CHILD";

/// In a process of its own, which the tests below start: a whole shard, as far as launch and link go.
/// In the test run itself it has nothing to do.
#[test]
fn shard_process() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let (launch, identity, mut parent) = child::announce().await.unwrap();
        let hello = Hello {
            rank: launch.rank,
            pid: std::process::id(),
            device: launch.device.to_string(),
            free_bytes: 0,
            total_bytes: 0,
        };
        let address = launch.coordinator;
        let link = connect(address, &launch.certificate, &identity, hello, LIMIT).await;
        let mut link = link.unwrap();
        println!("admitted among {}", link.world_size);
        eprintln!("and this is standard error");
        let gone = parent.gone();
        tokio::pin!(gone);
        loop {
            tokio::select! {
                command = link.receiver.recv() => match command.unwrap() {
                    ToShard::Stop => std::process::exit(0),
                    _ => link.sender.send(&FromShard::Allocated { kv_bytes: 5 }).await.unwrap(),
                },
                gone = &mut gone => std::process::exit(if gone == Gone::Lost { 9 } else { 10 }),
            }
        }
    });
}

/// A started and admitted shard process.
struct Shard {
    process: local::Process,
    link: topology::link::Admitted,
}

async fn shard() -> Shard {
    let mut listener = Listener::bind(Ipv4Addr::LOCALHOST.into()).expect("a listener");
    let this = std::env::current_exe().expect("this test");
    // The shell passes the variable on; the test harness prints lines before the announcement.
    let script = format!("echo hello from the shell; {CHILD}=1 exec \"$0\" \"$@\"");
    let arguments = ["-c".as_ref(), script.as_ref(), this.as_os_str()];
    let arguments = arguments
        .into_iter()
        .chain(["--exact", "shard_process", "--nocapture"].map(OsStr::new));
    let started = local::start(OsStr::new("sh"), arguments)
        .await
        .expect("it announces itself");
    assert!(started.said.process.is_running());
    listener.expect(Rank(3), started.said.certificate.clone());
    let launch = Launch {
        coordinator: listener.local_addr().expect("an address"),
        certificate: listener.certificate().clone(),
        rank: Rank(3),
        device: Device::Cpu {
            threads: 2,
            cores: vec![],
        },
        cpu_isa: "avx2".to_owned(),
        interface: None,
        hold: None,
    };
    let process = started.launch(&launch).await.expect("it listens");
    let mut link = listener.accept(LIMIT).await.expect("it connects");
    link.sender
        .send(&ToShard::Welcome {
            world_size: 4,
            generation: 0,
            pid: std::process::id(),
        })
        .await
        .expect("it reads");
    Shard { process, link }
}

/// Lines until one contains `word`.
async fn lines_until(process: &mut local::Process, word: &str) -> Vec<String> {
    let lines = process.lines.as_mut().expect("not taken");
    let mut seen = Vec::new();
    while !seen.last().is_some_and(|line: &String| line.contains(word)) {
        seen.push(
            timeout(LIMIT, lines.recv())
                .await
                .expect("in time")
                .expect("more lines"),
        );
    }
    seen
}

#[tokio::test]
async fn a_shard_is_launched_admitted_and_stopped() {
    let Shard {
        mut process,
        mut link,
    } = shard().await;
    assert_eq!(link.hello.rank, Rank(3));
    assert_eq!(Some(link.hello.pid), process.pid());
    assert_eq!(link.hello.device, "CPU, 2 threads");
    let seen = lines_until(&mut process, "standard error").await;
    assert_eq!(
        seen[0], "hello from the shell",
        "what came before the announcement"
    );
    link.sender
        .send(&ToShard::Allocate { num_blocks: 1 })
        .await
        .unwrap();
    let answer = link.receiver.recv_within(LIMIT).await.unwrap();
    assert_eq!(answer, FromShard::Allocated { kv_bytes: 5 });
    link.sender.send(&ToShard::Stop).await.unwrap();
    let status = timeout(LIMIT, process.wait()).await.unwrap().unwrap();
    assert!(status.success(), "{status}");
}

#[tokio::test]
async fn a_shard_ends_with_its_parent() {
    let Shard {
        mut process,
        link: _link,
    } = shard().await;
    process.hang_up();
    let status = timeout(LIMIT, process.wait()).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(9));
    // One that is told to end knows that nobody else will come.
    let Shard {
        mut process,
        link: _link,
    } = shard().await;
    let ended = process.dismiss(LIMIT).await.expect("it hears");
    assert_eq!(ended.code(), Some(10));
}

#[tokio::test]
async fn a_killed_shard_is_seen_at_once() {
    let Shard {
        mut process,
        mut link,
    } = shard().await;
    // Alive until then, though it does nothing.
    assert!(
        timeout(Duration::from_millis(300), process.wait())
            .await
            .is_err()
    );
    process.kill();
    let status = timeout(LIMIT, process.wait()).await.unwrap().unwrap();
    assert_eq!(status.signal(), Some(9));
    // The link itself only notices the silence.
    let quiet = link.receiver.recv_within(Duration::from_millis(100)).await;
    assert!(quiet.is_err());
}

async fn shell(script: &str) -> Result<local::Started, LaunchError> {
    local::start(OsStr::new("sh"), ["-c", script]).await
}

#[tokio::test]
async fn a_failed_start_says_what_the_process_wrote() {
    for (script, words) in [
        (
            "echo no such flag >&2; exit 2",
            ["ended before", "no such flag"],
        ),
        ("echo printed; exit 0", ["ended before", "printed"]),
        ("yes", ["no announcement", "y"]),
    ] {
        let error = shell(script).await.expect_err(script).to_string();
        for word in words {
            assert!(error.contains(word), "{script}: {error}");
        }
    }
    let nothing = Vec::<&str>::new();
    let error = local::start(OsStr::new("/no/such/program"), nothing).await;
    let error = error.expect_err("no program").to_string();
    assert!(error.contains("/no/such/program"), "{error}");
}

/// More output than pipe and channel hold, from a process that nobody listens to at first.
#[tokio::test]
async fn output_waits_and_is_not_lost() {
    let identity = topology::link::Identity::generate().unwrap();
    let announcement = topology::launch::Announcement {
        certificate: identity.certificate().clone(),
        process: ProcessId::own().unwrap(),
    };
    let line = serde_json::to_string(&announcement).unwrap();
    let script = format!(
        "echo '{line}'; read launch; \
         for i in $(seq 5000); do echo \"line $i is long enough to fill a pipe\"; done; \
         head -c 40000 /dev/zero | tr '\\0' x; echo; echo the end"
    );
    let started = shell(&script).await.unwrap();
    let launch = Launch {
        coordinator: (Ipv4Addr::LOCALHOST, 1).into(),
        certificate: identity.certificate().clone(),
        rank: Rank(0),
        device: Device::Gpu { index: 0, ranks: 1 },
        cpu_isa: "auto".to_owned(),
        interface: None,
        hold: None,
    };
    let mut process = started.launch(&launch).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let lines = lines_until(&mut process, "the end").await;
    let numbered = lines.iter().filter(|line| line.starts_with("line "));
    assert_eq!(numbered.count(), 5000);
    let long: usize = lines
        .iter()
        .filter(|line| line.starts_with("xxx"))
        .map(String::len)
        .sum();
    assert_eq!(long, 40_000, "a long line comes in parts");
    timeout(LIMIT, process.wait()).await.unwrap().unwrap();
}

/// What the operator has in the environment is not the shard's to know. The test starts itself with
/// a secret in its environment, and there starts a shard.
#[test]
fn nothing_secret_reaches_the_process() {
    const SECRET: &str = "CLUSTER_API_KEY";
    if std::env::var_os(SECRET).is_none() {
        let this = std::env::current_exe().unwrap();
        let mut again = std::process::Command::new(this);
        again.args(["--exact", "nothing_secret_reaches_the_process"]);
        let output = again.env(SECRET, "sesame").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{text}"
        );
        return;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let started = runtime.block_on(shell("env; tr '\\0' ' ' < /proc/self/cmdline; exit 1"));
    let seen = started.expect_err("no announcement").to_string();
    assert!(seen.contains("PATH="), "{seen}");
    assert!(
        !seen.contains("CLUSTER_") && !seen.contains("sesame"),
        "{seen}"
    );
}
