//! The HTTP facade over a scripted engine, as clients and attackers see it: over a socket.

mod background;
mod chat;
mod client;
mod completions;
mod connections;
mod limits;
mod routes;
mod support;
