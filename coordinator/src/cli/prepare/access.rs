//! Who may ask, and where: API keys and the address to serve at.

use crate::cli::args::Up;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};

/// Keys of the command line and of the file.
pub(super) fn keys(up: &Up) -> Result<Vec<String>> {
    let mut keys = up.api_key.clone();
    if let Some(file) = &up.api_key_file {
        let text = fs::read_to_string(file)
            .with_context(|| format!("cannot read --api-key-file {}", file.display()))?;
        let lines = text.lines().map(str::trim);
        let found: Vec<&str> = lines
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .collect();
        ensure!(
            !found.is_empty(),
            "--api-key-file {} holds no key; write one on a line of its own",
            file.display()
        );
        keys.extend(found.into_iter().map(str::to_owned));
    }
    ensure!(
        keys.iter().all(|key| !key.is_empty()),
        "an API key is empty; leave it out or give one"
    );
    Ok(keys)
}

/// Where to serve; other machines are served only with a key, or on demand.
pub(super) fn address(up: &Up, have_keys: bool) -> Result<SocketAddr> {
    let resolved = match up.host.parse::<IpAddr>() {
        Ok(ip) => Some(SocketAddr::new(ip, up.port)),
        Err(_) => (&*up.host, up.port)
            .to_socket_addrs()
            .with_context(|| format!("--host {} is neither an address nor a known name", up.host))?
            .next(),
    };
    let address = resolved.with_context(|| format!("--host {} has no address", up.host))?;
    ensure!(
        address.ip().is_loopback() || have_keys || up.insecure_no_api_key,
        "--host {} lets other machines in, and no API key is set; give --api-key or --api-key-file, \
         or --insecure-no-api-key if everyone who can reach it may use it",
        up.host
    );
    Ok(address)
}
