//! Keys and certificates: each process makes its own, and both ends accept exactly the certificates
//! they were told of.
//!
//! No certificate authority: a certificate is compared byte for byte, so another key, another name
//! or another launch's certificate is refused in the handshake. TLS 1.3 with `ring`, given explicitly;
//! sessions are never resumed, so every connection proves its key.
//!
//! Invariant: a private key never leaves the process that made it, but for the coordinator's, which
//! [`SavedIdentity`] hands to its successor through a file of this user's alone.

use super::{ALPN, LinkError, setup};
use crate::ids::Rank;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use rcgen::{CertificateParams, KeyPair};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The name in every certificate. Means nothing: certificates are told apart by their bytes.
pub(super) const NAME: &str = "cluster";

/// A process's public identity, in DER. As JSON it is base64.
#[derive(Clone, PartialEq, Eq)]
pub struct Certificate(pub(super) Vec<u8>);

impl Serialize for Certificate {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Certificate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        BASE64
            .decode(text)
            .map(Self)
            .map_err(serde::de::Error::custom)
    }
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Certificate({} bytes)", self.0.len())
    }
}

/// A process's own key with its certificate.
pub struct Identity {
    certificate: Certificate,
    key: PrivateKeyDer<'static>,
}

impl Identity {
    /// Makes a key that lives as long as this process.
    ///
    /// # Errors
    /// [`LinkError::Setup`] if the operating system gives no randomness.
    pub fn generate() -> Result<Self, LinkError> {
        let key = KeyPair::generate().map_err(|e| setup(&e))?;
        let mut params = CertificateParams::new([NAME.to_owned()]).map_err(|e| setup(&e))?;
        // Peers compare bytes and forget them when this launch ends; clocks play no part.
        params.not_before = rcgen::date_time_ymd(2000, 1, 1);
        params.not_after = rcgen::date_time_ymd(2100, 1, 1);
        let certificate = params.self_signed(&key).map_err(|e| setup(&e))?;
        let der = PrivateKeyDer::try_from(key.serialize_der()).map_err(setup)?;
        Ok(Self {
            certificate: Certificate(certificate.der().to_vec()),
            key: der,
        })
    }

    /// Everything, for whoever is to take this process's place.
    pub fn save(&self) -> SavedIdentity {
        SavedIdentity {
            certificate: self.certificate.clone(),
            key: BASE64.encode(self.key.secret_der()),
        }
    }

    /// The public part.
    pub fn certificate(&self) -> &Certificate {
        &self.certificate
    }

    fn chain(&self) -> Vec<CertificateDer<'static>> {
        vec![CertificateDer::from(self.certificate.0.clone())]
    }
}

/// A key with its certificate, to be kept where nobody else can read it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedIdentity {
    certificate: Certificate,
    /// PKCS #8, in base64.
    key: String,
}

impl SavedIdentity {
    /// The identity it was made of.
    ///
    /// # Errors
    /// [`LinkError::Setup`] if it is none.
    pub fn load(&self) -> Result<Identity, LinkError> {
        let key = BASE64.decode(&self.key).map_err(|e| setup(&e))?;
        Ok(Identity {
            certificate: self.certificate.clone(),
            key: PrivateKeyDer::try_from(key).map_err(setup)?,
        })
    }
}

impl fmt::Debug for SavedIdentity {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SavedIdentity").finish_non_exhaustive()
    }
}

impl fmt::Debug for Identity {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let certificate = &self.certificate;
        f.debug_struct("Identity")
            .field("certificate", certificate)
            .finish_non_exhaustive()
    }
}

/// The certificates that a listener waits for, by rank. Shared with the TLS handshake.
#[derive(Clone, Debug, Default)]
pub(super) struct Expected(Arc<Mutex<BTreeMap<Rank, Certificate>>>);

impl Expected {
    /// From now on this certificate, and no other, is this rank's.
    pub(super) fn insert(&self, rank: Rank, certificate: Certificate) {
        self.lock().insert(rank, certificate);
    }

    /// Whose certificate it is.
    pub(super) fn rank_of(&self, certificate: &[u8]) -> Option<Rank> {
        let expected = self.lock();
        let mut found = expected.iter().filter(|(_, known)| known.0 == certificate);
        found.next().map(|(rank, _)| *rank)
    }

    /// Takes a rank's certificate off the list, if it is still this one: it opens one link only.
    pub(super) fn take(&self, rank: Rank, certificate: &[u8]) -> bool {
        let mut expected = self.lock();
        let is_same = expected
            .get(&rank)
            .is_some_and(|known| known.0 == certificate);
        is_same && expected.remove(&rank).is_some()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Rank, Certificate>> {
        // A panic elsewhere leaves a map that is whole: each change is one operation.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The coordinator's side of the handshake.
pub(super) fn server(
    identity: &Identity,
    expected: Expected,
) -> Result<quinn::crypto::rustls::QuicServerConfig, LinkError> {
    let provider = Arc::new(ring::default_provider());
    let clients = PinnedClients {
        expected,
        provider: provider.clone(),
    };
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| setup(&e))?
        .with_client_cert_verifier(Arc::new(clients))
        .with_single_cert(identity.chain(), identity.key.clone_key())
        .map_err(|e| setup(&e))?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    // A resumed session would skip the check of the client's certificate.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.try_into().map_err(|e| setup(&e))
}

/// The shard's side of the handshake.
pub(super) fn client(
    identity: &Identity,
    server: &Certificate,
) -> Result<quinn::crypto::rustls::QuicClientConfig, LinkError> {
    let provider = Arc::new(ring::default_provider());
    let server = PinnedServer::new(server.clone());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| setup(&e))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(server))
        .with_client_auth_cert(identity.chain(), identity.key.clone_key())
        .map_err(|e| setup(&e))?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    config.try_into().map_err(|e| setup(&e))
}

/// Believes one server.
#[derive(Debug)]
pub(super) struct PinnedServer {
    certificate: Certificate,
    provider: Arc<CryptoProvider>,
}

impl PinnedServer {
    pub(super) fn new(certificate: Certificate) -> Self {
        let provider = Arc::new(ring::default_provider());
        Self {
            certificate,
            provider,
        }
    }
}

impl ServerCertVerifier for PinnedServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if **end_entity == *self.certificate.0 {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(unknown())
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// Believes whoever is expected.
#[derive(Debug)]
struct PinnedClients {
    expected: Expected,
    provider: Arc<CryptoProvider>,
}

impl ClientCertVerifier for PinnedClients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        match self.expected.rank_of(end_entity) {
            Some(_) => Ok(ClientCertVerified::assertion()),
            None => Err(unknown()),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

fn unknown() -> Error {
    Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)
}

fn no_tls12() -> Error {
    Error::General("TLS 1.2 is not spoken here".to_owned())
}
