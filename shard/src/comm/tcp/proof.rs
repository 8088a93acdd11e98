//! How two ranks prove to each other that they have the group's key, without showing it.
//!
//! ```text
//! connecting rank                               accepting rank
//!   ── hello: magic, its rank, nonce ────────────▶
//!   ◀─ reply: nonce, HMAC(accept, hello, nonce, rank) ──
//!   ── confirm: where it listens, HMAC(connect, hello, nonce, rank, where) ──▶
//! ```
//!
//! Both nonces enter both proofs, and each side's has a word of its own, so that nothing that was
//! heard or sent back helps anyone. What follows is in clear: networks between the hosts of a cluster
//! are private, as for NCCL. Pure: no I/O.

use super::identity::{ADDRESS_BYTES, KEY_BYTES, address_from_bytes, address_to_bytes};
use ring::hmac;
use std::net::SocketAddr;

const MAGIC: [u8; 8] = *b"clrank\0\x01";
pub(super) const HELLO_BYTES: usize = 8 + 4 + KEY_BYTES;
pub(super) const REPLY_BYTES: usize = 2 * KEY_BYTES;
pub(super) const CONFIRM_BYTES: usize = ADDRESS_BYTES + KEY_BYTES;

type Nonce = [u8; KEY_BYTES];

/// The connecting rank's first message.
pub(super) fn hello(rank: u32, nonce: Nonce) -> [u8; HELLO_BYTES] {
    let mut bytes = [0; HELLO_BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&rank.to_le_bytes());
    bytes[12..].copy_from_slice(&nonce);
    bytes
}

/// The rank that a hello claims; `None` if it is none.
pub(super) fn claimed_rank(hello: &[u8; HELLO_BYTES]) -> Option<u32> {
    let rank = [hello[8], hello[9], hello[10], hello[11]];
    hello.starts_with(&MAGIC).then(|| u32::from_le_bytes(rank))
}

/// What both sides have said so far, and who accepts.
pub(super) struct Talk<'a> {
    pub(super) key: &'a hmac::Key,
    pub(super) hello: &'a [u8; HELLO_BYTES],
    pub(super) acceptor: u32,
}

impl Talk<'_> {
    /// The accepting rank's answer.
    pub(super) fn reply(&self, nonce: Nonce) -> [u8; REPLY_BYTES] {
        let mut bytes = [0; REPLY_BYTES];
        bytes[..KEY_BYTES].copy_from_slice(&nonce);
        let tag = hmac::sign(self.key, &self.said("accept", &nonce, &[]));
        bytes[KEY_BYTES..].copy_from_slice(tag.as_ref());
        bytes
    }

    /// The connecting rank's last message, if the reply proves the key.
    pub(super) fn confirm(
        &self,
        reply: &[u8; REPLY_BYTES],
        address: SocketAddr,
    ) -> Option<[u8; CONFIRM_BYTES]> {
        let (nonce, proof) = reply.split_first_chunk()?;
        hmac::verify(self.key, &self.said("accept", nonce, &[]), proof).ok()?;
        let address = address_to_bytes(address);
        let tag = hmac::sign(self.key, &self.said("connect", nonce, &address));
        let mut bytes = [0; CONFIRM_BYTES];
        bytes[..ADDRESS_BYTES].copy_from_slice(&address);
        bytes[ADDRESS_BYTES..].copy_from_slice(tag.as_ref());
        Some(bytes)
    }

    /// Where the connecting rank listens, if it has proven the key for this reply.
    pub(super) fn confirmed(
        &self,
        reply: &[u8; REPLY_BYTES],
        confirm: &[u8; CONFIRM_BYTES],
    ) -> Option<SocketAddr> {
        let (nonce, _) = reply.split_first_chunk()?;
        let (address, proof) = confirm.split_first_chunk::<ADDRESS_BYTES>()?;
        hmac::verify(self.key, &self.said("connect", nonce, address), proof).ok()?;
        Some(address_from_bytes(*address))
    }

    fn said(&self, role: &str, nonce: &Nonce, address: &[u8]) -> Vec<u8> {
        let acceptor = self.acceptor.to_le_bytes();
        // All parts but the last have a fixed length for a role.
        [role.as_bytes(), self.hello, nonce, &acceptor, address].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_key_proves_and_nothing_can_be_replayed() {
        let key = |byte: u8| hmac::Key::new(hmac::HMAC_SHA256, &[byte; KEY_BYTES]);
        let (ours, other) = (key(1), key(2));
        let first = hello(3, [7; KEY_BYTES]);
        let talk = |key, hello, acceptor| Talk {
            key,
            hello,
            acceptor,
        };
        let address: SocketAddr = "10.1.2.3:456".parse().unwrap();
        let honest = talk(&ours, &first, 1);
        let reply = honest.reply([9; KEY_BYTES]);
        let confirm = honest.confirm(&reply, address).unwrap();
        assert_eq!(honest.confirmed(&reply, &confirm), Some(address));
        // Another key, another hello, another acceptor, another nonce, a bit elsewhere.
        let later = hello(3, [8; KEY_BYTES]);
        for wrong in [
            talk(&other, &first, 1),
            talk(&ours, &later, 1),
            talk(&ours, &first, 2),
        ] {
            assert_eq!(wrong.confirm(&reply, address), None);
            assert_eq!(wrong.confirmed(&reply, &confirm), None);
        }
        assert_eq!(
            honest.confirmed(&honest.reply([1; KEY_BYTES]), &confirm),
            None
        );
        for byte in 0..CONFIRM_BYTES {
            let mut bent = confirm;
            bent[byte] ^= 4;
            assert_eq!(honest.confirmed(&reply, &bent), None, "byte {byte}");
        }
        for byte in 0..REPLY_BYTES {
            let mut bent = reply;
            bent[byte] ^= 4;
            assert_eq!(honest.confirm(&bent, address), None, "byte {byte}");
        }
        assert_eq!(claimed_rank(&first), Some(3));
        assert_eq!(claimed_rank(&[0; HELLO_BYTES]), None);
    }
}
