"""XML signatures of CAP messages: who signed, checked against certificates that the operator keeps in a folder.

    bytes ── one enveloped signature over the whole document, by a known and valid certificate ──> what was signed, who

A signature may cover one part of a document while a program reads another ("wrapping"). Here it has to stand directly
in `alert`, has to cover everything (`URI=""`) but itself, and what is read on is not the document that came but the
bytes that were signed. Keys and certificates that a message brings along prove nothing: only those of the folder count.
A certificate speaks for the senders that it names (subject alternative names, common names), and for nobody else.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature as WrongSignature
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from lxml import etree
from signxml.algorithms import DigestAlgorithm, SignatureMethod
from signxml.exceptions import SignXMLException
from signxml.verifier import SignatureConfiguration, VerifyResult, XMLVerifier

from gateway.cap_xml import SIGNATURE_NAMESPACE, CapRefused, brief, parse_xml

RSA_BITS_MIN = 2048
EC_BITS_MIN = 256

_METHODS = frozenset(
    {
        SignatureMethod.RSA_SHA256,
        SignatureMethod.RSA_SHA384,
        SignatureMethod.RSA_SHA512,
        SignatureMethod.SHA256_RSA_MGF1,
        SignatureMethod.SHA384_RSA_MGF1,
        SignatureMethod.SHA512_RSA_MGF1,
        SignatureMethod.ECDSA_SHA256,
        SignatureMethod.ECDSA_SHA384,
        SignatureMethod.ECDSA_SHA512,
    }
)
"""No SHA-1, and no HMAC: with it a certificate's public key would be a password that everybody knows."""
_DIGESTS = frozenset({DigestAlgorithm.SHA256, DigestAlgorithm.SHA384, DigestAlgorithm.SHA512})
_METHOD_NAMES = {method.value for method in _METHODS}
_DIGEST_NAMES = {digest.value for digest in _DIGESTS}
_ENVELOPED = "http://www.w3.org/2000/09/xmldsig#enveloped-signature"
_CANONICAL = {
    "http://www.w3.org/TR/2001/REC-xml-c14n-20010315",
    "http://www.w3.org/2006/12/xml-c14n11",
    "http://www.w3.org/2001/10/xml-exc-c14n#",
}
"""Those that drop comments, which nobody should read anything into."""
_DS = f"{{{SIGNATURE_NAMESPACE}}}"


@dataclass(frozen=True, slots=True)
class Signed:
    """What was signed, and by whom."""

    document: bytes
    """Canonical XML, without the signature. The only thing to read on."""
    certificate: x509.Certificate

    @property
    def subject(self) -> str:
        """The certificate's owner, for people."""
        return self.certificate.subject.rfc4514_string()

    def speaks_for(self, sender: str) -> bool:
        """Whether the certificate names this sender of CAP messages."""
        return sender in _names(self.certificate)


class CapCertificates:
    """Certificates whose owners may sign. Read once, at the start. Thread-safe."""

    def __init__(self, certificates: list[x509.Certificate]) -> None:
        """Raises ValueError for a key that is too weak or of a kind that is not taken."""
        for certificate in certificates:
            _check_key(certificate)
        self._certificates = certificates

    @classmethod
    def read(cls, folder: Path) -> CapCertificates:
        """Every `*.pem` and `*.crt` of a folder; a file may hold several. Raises ValueError naming it; OSError."""
        certificates: list[x509.Certificate] = []
        paths = sorted(path for path in folder.iterdir() if path.suffix in (".pem", ".crt"))
        for path in paths:
            try:
                found = x509.load_pem_x509_certificates(path.read_bytes())
                cls(found)
            except ValueError as error:
                raise ValueError(f"{path}: must hold certificates (PEM) to check CAP messages with: {error}") from None
            certificates += found
        if not certificates:
            raise ValueError(f"{folder}: must hold certificates in files *.pem or *.crt, got none")
        return cls(certificates)

    def verify(self, document: bytes, now: datetime) -> Signed | None:
        """What was signed; None if there is no signature. Raises CapRefused."""
        root = parse_xml(document)
        signature = _only_signature(root)
        if signature is None:
            return None
        _check_shape(signature)
        certificate = self._certificate_of(signature, now)
        return Signed(_verified(root, signature, certificate, now), certificate)

    def _certificate_of(self, signature: etree._Element, now: datetime) -> x509.Certificate:
        """The folder's certificate that the signature names; the only one that there is if it names none."""
        line = signature.sourceline
        brought = [_der(element) for element in signature.iter(f"{_DS}X509Certificate")]
        known = [
            certificate
            for certificate in self._certificates
            if not brought or certificate.public_bytes(Encoding.DER) in brought
        ]
        if not known:
            raise _refused("a certificate that is configured here", _subjects(brought), line)
        if len(known) > 1:
            raise _refused("its certificate in KeyInfo, and no second one", f"{len(known)} that it may be", line)
        (certificate,) = known
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            until = f"{certificate.not_valid_before_utc:%Y-%m-%d} to {certificate.not_valid_after_utc:%Y-%m-%d}"
            raise _refused(
                "a certificate that is valid now", f"{certificate.subject.rfc4514_string()}, valid {until}", line
            )
        return certificate


NO_CERTIFICATES = CapCertificates([])
"""Where none are configured: every signature is refused, as it cannot be checked."""


def _refused(expected: str, came: str, line: int | None, element: str = "Signature") -> CapRefused:
    return CapRefused("signature", element, expected, came, line)


def _only_signature(root: etree._Element) -> etree._Element | None:
    signatures = list(root.iter(f"{_DS}Signature"))
    if not signatures:
        return None
    if len(signatures) > 1:
        raise _refused("one signature", f"{len(signatures)}", signatures[1].sourceline)
    (signature,) = signatures
    if signature.getparent() is not root:
        parent = signature.getparent()
        came = "the root itself" if parent is None else f"one in {brief(etree.QName(parent).localname)}"
        raise _refused("a signature directly in alert", came, signature.sourceline)
    return signature


def _check_shape(signature: etree._Element) -> None:
    """One reference, to the whole document; the transforms that are needed and no other; strong algorithms."""
    line = signature.sourceline
    if signature.find(f"{_DS}Object") is not None:
        raise _refused("no Object in it", "an Object", line)
    for path, known, element in (
        (f"{_DS}SignedInfo/{_DS}SignatureMethod", _METHOD_NAMES, "Signature/SignedInfo/SignatureMethod"),
        (f"{_DS}SignedInfo/{_DS}CanonicalizationMethod", _CANONICAL, "Signature/SignedInfo/CanonicalizationMethod"),
        (
            f"{_DS}SignedInfo/{_DS}Reference/{_DS}DigestMethod",
            _DIGEST_NAMES,
            "Signature/SignedInfo/Reference/DigestMethod",
        ),
    ):
        found = signature.findall(path)
        if len(found) != 1:
            raise _refused("exactly one", f"{len(found)}", line, element)
        if found[0].get("Algorithm") not in known:
            expected = "an algorithm of " + ", ".join(sorted(_short(name) for name in known))
            raise _refused(expected, brief(_short(found[0].get("Algorithm", ""))), found[0].sourceline, element)
    (reference,) = signature.findall(f"{_DS}SignedInfo/{_DS}Reference")
    if reference.get("URI") != "":
        expected = 'URI="", the whole document'
        raise _refused(expected, brief(reference.get("URI")), reference.sourceline, "Signature/SignedInfo/Reference")
    transforms = [node.get("Algorithm", "") for node in reference.findall(f"{_DS}Transforms/{_DS}Transform")]
    if transforms[:1] != [_ENVELOPED] or len(transforms) > 2 or not set(transforms[1:]) <= _CANONICAL:
        expected = "enveloped-signature, then at most one canonicalization"
        came = brief(", ".join(map(_short, transforms)))
        raise _refused(expected, came, reference.sourceline, "Signature/SignedInfo/Reference/Transforms")


def _verified(root: etree._Element, signature: etree._Element, certificate: x509.Certificate, now: datetime) -> bytes:
    """The bytes that the signature was made over."""
    line = signature.sourceline
    configuration = SignatureConfiguration(
        require_x509=True,
        location="./",
        expect_references=1,
        signature_methods=_METHODS,
        digest_algorithms=_DIGESTS,
        ignore_ambiguous_key_info=True,  # the key is the configured one, whatever KeyInfo says
        verification_time=now,
    )
    try:
        result = XMLVerifier().verify(root, x509_cert=certificate, expect_config=configuration)
    except (SignXMLException, WrongSignature, ValueError, etree.LxmlError) as error:
        came = str(error).partition("\n")[0] or type(error).__name__
        raise _refused("a signature that fits the message", brief(came), line) from None
    assert isinstance(result, VerifyResult), "one reference has one result"
    return result.signed_data


def _der(element: etree._Element) -> bytes:
    try:
        return base64.b64decode("".join((element.text or "").split()), validate=True)
    except (binascii.Error, ValueError):
        raise _refused(
            "base64", brief(element.text), element.sourceline, "Signature/KeyInfo/X509Data/X509Certificate"
        ) from None


def _subjects(brought: list[bytes]) -> str:
    if not brought:
        return "none, and none is configured"
    try:
        return brief(x509.load_der_x509_certificate(brought[0]).subject.rfc4514_string())
    except ValueError:
        return "something that is no certificate"


def _names(certificate: x509.Certificate) -> set[str]:
    names = {str(name.value) for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)}
    try:
        alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return names
    for kind in (x509.RFC822Name, x509.UniformResourceIdentifier, x509.DNSName):
        names.update(alternative.get_values_for_type(kind))
    return names


def _check_key(certificate: x509.Certificate) -> None:
    key = certificate.public_key()
    if isinstance(key, rsa.RSAPublicKey):
        least, kind = RSA_BITS_MIN, "RSA"
    elif isinstance(key, ec.EllipticCurvePublicKey):
        least, kind = EC_BITS_MIN, "elliptic curve"
    else:
        raise ValueError(f"a key must be RSA or of an elliptic curve, got {type(key).__name__}")
    if key.key_size < least:
        raise ValueError(f"a key ({kind}) must have at least {least} bits, got {key.key_size}")


def _short(algorithm: str) -> str:
    return algorithm.rstrip("#").rpartition("/")[2].rpartition("#")[2] or algorithm


def utc_now(now_ms: int) -> datetime:
    """The time that a certificate has to be valid at."""
    return datetime.fromtimestamp(now_ms / 1000, UTC)
