//! The HTTP facade over a scripted engine, as clients and attackers see it: over a socket.

mod background;
mod chat;
mod client;
mod completions;
mod connections;
mod limits;
mod overload;
mod paced;
mod routes;
mod support;
