//! Two hosts on one machine: network namespaces with addresses of their own and an SSH server in each,
//! joined by a bridge. Made by a test that runs as root, and removed with it.

use crate::process::until;
use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A bridge, and nodes `a` and `b` on it.
pub(crate) struct Network {
    /// Keys and configuration; nobody else's are read or changed.
    dir: tempfile::TempDir,
    /// Names of bridge and namespaces begin with it.
    prefix: String,
    /// The first three numbers of all addresses.
    subnet: String,
    servers: Vec<Child>,
}

/// What a topology file says of each node.
pub(crate) struct NodeText<'a> {
    pub(crate) name: &'a str,
    pub(crate) shards: u32,
}

impl Network {
    /// `None`, after saying why, where hosts cannot be made.
    #[expect(clippy::print_stdout, reason = "a test that did not run must say so")]
    pub(crate) fn make() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: network namespaces need root");
            return None;
        }
        for program in ["ip", "ssh", "ssh-keygen", "nsenter", "/usr/sbin/sshd"] {
            let found = Command::new(program)
                .arg("-V")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
            if found.is_err() {
                println!(
                    "skipped: {program} is missing (iproute2, openssh-client, openssh-server, util-linux)"
                );
                return None;
            }
        }
        let pid = std::process::id();
        let mut network = Self {
            dir: tempfile::tempdir().expect("a directory"),
            prefix: format!("cl{pid}"),
            subnet: format!("10.77.{}", pid % 250),
            servers: Vec::new(),
        };
        let bridge = network.bridge();
        if !ip(&["link", "add", &bridge, "type", "bridge"]) {
            println!("skipped: this system makes no bridges");
            return None;
        }
        let address = format!("{}/24", network.coordinator());
        assert!(ip(&["addr", "add", &address, "dev", &bridge]));
        assert!(ip(&["link", "set", &bridge, "up"]));
        network.make_client();
        for node in ["a", "b"] {
            network.make_node(node);
        }
        Some(network)
    }

    fn bridge(&self) -> String {
        format!("{}br", self.prefix)
    }

    fn namespace(&self, node: &str) -> String {
        format!("{}{node}", self.prefix)
    }

    /// The coordinator's address.
    pub(crate) fn coordinator(&self) -> String {
        format!("{}.1", self.subnet)
    }

    /// A node's address.
    pub(crate) fn address(&self, node: &str) -> String {
        let last = if node == "a" { 2 } else { 3 };
        format!("{}.{last}", self.subnet)
    }

    /// A file of the client or a server.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Where the program is put on a node; its name needs quoting.
    pub(crate) fn work_dir(&self, node: &str) -> PathBuf {
        self.path(&format!("it's {node}"))
    }

    fn make_client(&self) {
        keygen(&self.path("client"));
        keygen(&self.path("stranger"));
        fs::copy(self.path("client.pub"), self.path("authorized")).expect("a file");
        let config = format!(
            "UserKnownHostsFile {}\nGlobalKnownHostsFile /dev/null\n",
            self.path("known").display()
        );
        fs::write(self.path("config"), config).expect("a file");
        fs::write(self.path("known"), "").expect("a file");
    }

    fn make_node(&mut self, node: &str) {
        let namespace = self.namespace(node);
        let (outer, inner) = (format!("{namespace}o"), format!("{namespace}i"));
        let address = format!("{}/24", self.address(node));
        assert!(ip(&["netns", "add", &namespace]));
        assert!(ip(&[
            "link", "add", &outer, "type", "veth", "peer", "name", &inner
        ]));
        assert!(ip(&["link", "set", &outer, "master", &self.bridge(), "up"]));
        assert!(ip(&["link", "set", &inner, "netns", &namespace]));
        for rest in [
            &["link", "set", "lo", "up"][..],
            &["addr", "add", &address, "dev", &inner],
            &["link", "set", &inner, "up"],
        ] {
            assert!(ip(&[&["-n", &namespace], rest].concat()));
        }
        let key = self.path(&format!("host-{node}"));
        keygen(&key);
        let public = fs::read_to_string(key.with_extension("pub")).expect("a file");
        let known = fs::read_to_string(self.path("known")).expect("a file");
        let known = format!("{known}{} {public}", self.address(node));
        fs::write(self.path("known"), known).expect("a file");
        let config = format!(
            "ListenAddress {}\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nUsePAM no\n\
             PasswordAuthentication no\nKbdInteractiveAuthentication no\nStrictModes no\n\
             PermitRootLogin prohibit-password\nLogLevel ERROR\n",
            self.address(node),
            key.display(),
            self.path("authorized").display()
        );
        let file = self.path(&format!("sshd-{node}"));
        fs::write(&file, config).expect("a file");
        // Where sshd locks its unprivileged half up; a service would make it.
        fs::create_dir_all("/run/sshd").expect("a directory");
        let server = Command::new("ip")
            .args([
                "netns",
                "exec",
                &namespace,
                "/usr/sbin/sshd",
                "-D",
                "-e",
                "-f",
            ])
            .arg(&file)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        self.servers.push(server.expect("sshd starts"));
        let address = format!("{}:22", self.address(node));
        until("sshd listens", || TcpStream::connect(&address).is_ok());
    }

    /// A topology file with these nodes and one model over all of them.
    pub(crate) fn topology(&self, nodes: &[NodeText<'_>]) -> PathBuf {
        let mut text = format!("[coordinator]\naddress = \"{}\"\n", self.coordinator());
        for NodeText { name, shards } in nodes {
            let node = format!(
                "[[node]]\nname = \"{name}\"\naddress = \"{}\"\ncpus = {shards}\nshards = {shards}\n\
                 work_dir = \"{}\"\n[node.ssh]\nuser = \"root\"\nidentity = \"{}\"\nconfig = \"{}\"\n",
                self.address(name),
                self.work_dir(name).display(),
                self.path("client").display(),
                self.path("config").display(),
            );
            text.push_str(&node);
        }
        let file = self.path("cluster.toml");
        fs::write(&file, text).expect("a file");
        file
    }

    /// Process ids of the shards on a node, oldest first.
    pub(crate) fn shards(&self, node: &str) -> Vec<u32> {
        let mut pids = self.processes(node);
        pids.retain(|pid| {
            let arguments = fs::read_to_string(format!("/proc/{pid}/cmdline"));
            arguments.is_ok_and(|arguments| !arguments.contains("--attend"))
        });
        pids
    }

    /// Process ids on a node that run its copy of the program, oldest first.
    pub(crate) fn processes(&self, node: &str) -> Vec<u32> {
        let work_dir = self.work_dir(node);
        let runs = |pid: &u32| {
            let program = fs::read_link(format!("/proc/{pid}/exe"));
            program.is_ok_and(|program| program.starts_with(&work_dir))
        };
        let entries = fs::read_dir("/proc").expect("there is a /proc").flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let mut pids: Vec<u32> = pids.filter(runs).collect();
        pids.sort_unstable();
        pids
    }

    /// Whether a process is on a node.
    pub(crate) fn is_on(&self, pid: u32, node: &str) -> bool {
        let of_process = fs::read_link(format!("/proc/{pid}/ns/net"));
        let server = &self.servers[usize::from(node == "b")];
        let of_node = fs::read_link(format!("/proc/{}/ns/net", server.id()));
        of_process.expect("it runs") == of_node.expect("it runs")
    }

    /// Lays a directory over another one, for a node alone.
    pub(crate) fn mount(&self, node: &str, from: &Path, over: &Path) {
        // `ip netns exec` gave the server mounts of its own.
        let server = self.servers[usize::from(node == "b")].id().to_string();
        let mut nsenter = Command::new("nsenter");
        let nsenter = nsenter
            .args(["--target", &server, "--mount", "mount", "--bind"])
            .args([from, over]);
        assert!(nsenter.status().expect("nsenter runs").success());
    }

    /// Cuts a node off, or joins it again.
    pub(crate) fn set_link(&self, node: &str, state: &str) {
        let outer = format!("{}o", self.namespace(node));
        assert!(ip(&["link", "set", &outer, state]));
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for server in &mut self.servers {
            let _ = server.kill();
            let _ = server.wait();
        }
        for node in ["a", "b"] {
            ip(&["netns", "del", &self.namespace(node)]);
            // A namespace lives as long as a process in it, and its end of the wire with it.
            ip(&["link", "del", &format!("{}o", self.namespace(node))]);
        }
        ip(&["link", "del", &self.bridge()]);
    }
}

fn ip(arguments: &[&str]) -> bool {
    let mut ip = Command::new("ip");
    let ran = ip.args(arguments).stderr(Stdio::null()).status();
    ran.is_ok_and(|status| status.success())
}

fn keygen(file: &Path) {
    let mut keygen = Command::new("ssh-keygen");
    let keygen = keygen
        .args(["-q", "-t", "ed25519", "-N", "", "-f"])
        .arg(file);
    assert!(keygen.status().expect("ssh-keygen runs").success());
}
